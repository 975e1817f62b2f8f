"""A question and a picture to ids and pixels."""
