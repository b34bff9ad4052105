"""Files for certain readers only: age, and the reference system's .stim."""
