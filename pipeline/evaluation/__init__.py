"""What a compiled model is worth: sentences, labelled texts, metrics, and a classifier to try."""
