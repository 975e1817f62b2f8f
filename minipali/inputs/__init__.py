"""A question and a picture to ids and pixels.

Text: read_tokenizer.py finds a folder's tokenizer and what its files declare. tokenizer.py is the way from text to ids
and back, step by step; each step has a file of its own, in this order: special_tokens.py, normalizers.py (with
charsmap.py), pre_tokenizers.py, and then either bpe.py (Gemma, SigLIP 2) or unigram.py (T5, SigLIP 1). The two file
formats are read by tokenizer_json.py and by sentencepiece.py with protobuf.py. captions.py prepares text for SigLIP.

Pictures: folder.py says which files are meant, image.py turns a file into the numbers that the vision tower reads.
"""
