"""From an answer to shapes and pictures.

An answer is text such as `<loc0100><loc0200><loc0800><loc0900> cat`. Read on in this order: boxes.py (the text to boxes
in pixels and back), masks.py (<seg> codes to masks over the whole picture), draw.py (both drawn onto it), sheets.py
(many pictures on one), picture_file.py (a picture as a file).
"""
