"""In and out: files, text, pictures and decoding, all that stands between a user and the model's arrays."""
