"""What files may say: one schema per kind (kinds.py), and how a file is checked against it (checking.py)."""
