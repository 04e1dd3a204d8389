"""Data for calibration and evaluation: from files, or synthetic."""
