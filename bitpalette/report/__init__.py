"""The page of `quantize report`: gather (`data.py`, `histogram.py`), draw (`pictures.py`), render (`page.py`)."""
