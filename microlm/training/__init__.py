"""One loop for every model; the loss alone differs. Which model, text and loss it gets is said in pipeline."""
