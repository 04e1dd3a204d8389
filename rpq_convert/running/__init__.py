"""How any model is called and watched: blocks, weight reads, models without weights."""
