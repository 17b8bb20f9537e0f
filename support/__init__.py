"""What the scripts share and no reader of the paper needs. Imports dydilit.py and libraries."""
