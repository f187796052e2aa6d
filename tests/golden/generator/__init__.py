"""The golden cases, by subject. `generate.py` beside this folder runs them."""
