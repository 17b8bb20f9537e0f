"""How good samples are: images, features, figures. For eval_min.py; imports support/ only."""
