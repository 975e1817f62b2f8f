"""From scores to an answer: a loaded model, features and prompts come in, answers as token ids go out.

Read in this order:

- `loaded_model`: a checkpoint with its tokenizer and its preprocessor; prompts as ids;
- `sampling`: from the scores of one position to a token, and what its probability is;
- `generate`: prefill, then token by token, for several rows at once;
- `search`: several ways to go on from one prefix: beam search, the best of n, the score of a given answer;
- `grammar`: which tokens may follow where the answer to "detect" has to be boxes;
- `batch`: many questions about many pictures;
- `pair`: the contrastive pair, which writes nothing and compares.
"""
