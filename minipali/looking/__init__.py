"""What happened inside: all here reads recorded activations (minipali/trace.py), and the model knows nothing of it.

`compare` sets two recordings side by side and names the first array that differs. `gather` answers a question about a
picture and keeps all that was seen on the way; `logit_lens`, `attribution` and `panels` work out of it what is shown,
`lens` prints and draws the two most asked for, and `page` writes the whole as one file for a browser (the folder
page/ holds its text, style and script).
"""
