"""One loop for every arm; the loss alone differs."""
