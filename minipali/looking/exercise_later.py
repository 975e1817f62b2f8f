"""The second half of the exercises: contrastive learning, the language model, decoding, boxes, gradients."""
import numpy as np

from minipali.looking.exercise import Case, Exercise, bundled
from minipali.model.gemma import KVCache

OPS, GEMMA, PALIGEMMA, LOSSES = (f"minipali.model.{name}" for name in ("ops", "gemma", "paligemma", "losses"))
SAMPLING, BOXES, BACKWARD = "minipali.decoding.sampling", "minipali.outputs.boxes", "minipali.learning.backward.ops"
TEST_OPS, TEST_LOSSES, TEST_MODEL = (f"tests/model/test_{name}.py" for name in ("ops", "losses", "paligemma"))
TEST_BACKWARD = "tests/learning/backward/test_backward.py"


def normal(*shape, scale=1.0):
    """A function from a random generator to a tuple with one array."""
    return lambda rng: (scale * rng.standard_normal(shape),)


def pairs(rng, scale=1.0):
    """Vectors of four pictures and four captions, some long and some short, and the logarithm of the scale."""
    length = rng.uniform(0.2, 5.0, (4, 1))
    return length * rng.standard_normal((4, 6)), rng.standard_normal((4, 6)) / length, np.array([np.log(scale)])


def decoder_inputs(rng):
    """Tokens of the bundled decoder's width, its first MLP."""
    model = bundled()
    p = model.params["language_model"]["model"]["layers"][0]["mlp"]
    return rng.standard_normal((2, 3, model.cfg.text_config.hidden_size)), p


def embedding_inputs(rng):
    """Token ids, and the bundled decoder."""
    model = bundled()
    ids = rng.integers(4, model.cfg.text_config.vocab_size - 1, (2, 3))
    return ids, model.params["language_model"]["model"], model.cfg.text_config


def positions(rng):
    """Two rows of five positions, the second with two places of padding; prefixes of 3 and 2."""
    row = np.arange(5)
    return np.stack([row, np.where(row < 3, row, -1)]), np.stack([row, np.where(row < 3, row, -1)]), np.array([3, 2])


def stored(function, cache, k, v):
    """What `KVCache.store` returns for two pieces, one after the other."""
    results = []
    for start, stop in [(0, 3), (3, 4)]:
        cache.reserve(np.arange(start, stop)[None])
        results.append([x.copy() for x in function(cache, 1, k[:, start:stop], v[:, start:stop])])
    return results


def cache_inputs(rng):
    """An empty cache for four tokens of the bundled decoder, and keys and values for them."""
    cfg = bundled().cfg.text_config
    shape = (1, 4, cfg.num_key_value_heads, cfg.head_dim)
    k, v = rng.standard_normal(shape), rng.standard_normal(shape)
    return CacheInputs((KVCache(k, 1, 4, cfg), k, v))


class CacheInputs(list):
    """Arguments that are meant to be changed: the cache is the one mutable object of the model."""


def two_steps(function, features, ids, more, model):
    """Prefill a prompt, then two tokens through `decode`: the scores after each."""
    from minipali.model.paligemma import prefill
    cache = KVCache(features, 1, features.shape[1] + ids.shape[1] + 2, model.cfg.text_config)
    prefill(features, ids, np.array([ids.shape[1]]), model.params, model.cfg, cache)
    return [function(more[:, i:i + 1], model.params, model.cfg, cache) for i in range(2)]


def decode_inputs(rng):
    """A few picture tokens, a prompt and two tokens of an answer for the bundled model."""
    model = bundled()
    features = rng.standard_normal((1, 3, model.cfg.text_config.hidden_size))
    ids, more = rng.integers(4, 200, (1, 4)), rng.integers(4, 200, (1, 2))
    return features, ids, more, model


def forward_and_pull(function, *arguments):
    """A backward function's result and its gradients, for a random dy: (y, pull(dy))."""
    y, pull = function(*arguments)
    return y, pull(np.random.default_rng(7).standard_normal(y.shape))


LATER = [
    Exercise(
        "log-sum-exp", OPS, "log_sum_exp", "contrastive learning", "the logarithm of a sum of exponentials",
        "exp of 1000 is infinite although the logarithm of the sum is only a little above 1000.",
        ("Take the largest number out of the sum: log Σ exp(x) = m + log Σ exp(x - m).",),
        (Case("Sum over the last axis, which is gone afterwards.", normal(2, 3, 4)),
         Case("Large numbers overflow in exp: take the largest out first.", normal(3, 4, scale=1e4))),
        ("m = x.max(-1, keepdims=True)", "m = 0 * x.max(-1, keepdims=True)"), (TEST_OPS, "logarithms")),
    Exercise(
        "log-softmax", OPS, "log_softmax", "contrastive learning",
        "the logarithm of softmax, for improbable things too",
        "A probability of exp(-2000) rounds to 0, and log(0) is -infinity, where the truth is -2000.",
        ("log(exp(x) / Σ exp(x)) = x - log Σ exp(x).", "`log_sum_exp` is there already."),
        (Case("x minus the logarithm of the sum, for every number of the row.", normal(2, 3, 4)),
         Case("Do not take the logarithm of a probability that has rounded to 0.",
              lambda rng: (np.array([[0.0, -2000.0]]),))),
        ("x - log_sum_exp(x)[..., None]", "np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))"),
        (TEST_OPS, "logarithms")),
    Exercise(
        "log-sigmoid", OPS, "log_sigmoid", "contrastive learning", "the logarithm of 1 / (1 + exp(-x))",
        "At x = -1000 the textbook form is log(1 / infinity).",
        ("For x >= 0: -log(1 + exp(-x)). For x < 0: x - log(1 + exp(x)).",
         "Both at once: min(x, 0) - log1p(exp(-|x|))."),
        (Case("It is never positive, and at 0 it is -log 2.", normal(3, 4)),
         Case("Far to the left it is x itself: keep the exponent below 0.",
              lambda rng: (np.array([-1e4, -800.0, 0.0, 800.0]),))),
        ("np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))", "np.log(1 / (1 + np.exp(-x)))"), (TEST_OPS, "log_sigmoid")),
    Exercise(
        "similarity", LOSSES, "similarity", "contrastive learning", "compare every picture with every caption",
        "Without the normalization the longest vector wins, whatever it says.",
        ("Bring every vector to length 1: then the dot product is a cosine.", "The scale is stored as a logarithm."),
        (Case("Use cosines: both sides to length 1 before the product.", pairs),
         Case("The table is multiplied by exp(log_scale).", lambda rng: pairs(rng, 7.0))),
        ("l2_normalize(images) @ l2_normalize(texts).T", "images @ texts.T"), (TEST_LOSSES, "similarity")),
    Exercise(
        "clip-loss", LOSSES, "clip_loss", "contrastive learning", "CLIP: each picks its partner among all, both ways",
        "Each picture chooses a caption AND each caption chooses a picture.",
        ("Row i of the table is picture i's choice; the right answer is column i.", "Mean over both directions."),
        (Case("Average the two directions: rows of the table, and rows of its transpose.", pairs),
         Case("Large similarities must not overflow: use log_softmax.", lambda rng: pairs(rng, 1e5))),
        ("0.5 * (pick_text + pick_image)", "pick_text"), (TEST_LOSSES, "losses or pairs or rights")),
    Exercise(
        "siglip-loss", LOSSES, "siglip_loss", "contrastive learning", "SigLIP: each pair is a yes or a no of its own",
        "Sum over the pairs of a picture, mean over the pictures: a mean over all B² fades as the batch grows.",
        ("+1 on the diagonal, -1 everywhere else.", "-log_sigmoid(sign · (similarity + bias)), summed along a row."),
        (Case("Sum along each row, then the mean over the rows: not the mean over all pairs.",
              lambda rng: (*pairs(rng, 3.0), np.array([-2.0]))),),
        (".sum(-1).mean()", ".mean()"), (TEST_LOSSES, "losses or pairs or rights")),
    Exercise(
        "cross-entropy", LOSSES, "cross_entropy", "the language model", "how surprised the model is by the right token",
        "It is minus the logarithm of a probability: never negative, and finite for a hopeless guess.",
        ("log_softmax, then one number from each row.", "Index with np.arange for the rows and the targets."),
        (Case("Pick the target's log-probability of each row and change its sign.",
              lambda rng: (rng.standard_normal((4, 6)), rng.integers(0, 6, 4))),
         Case("A hopeless guess costs a lot, but not infinity.",
              lambda rng: (np.array([[0.0, -3000.0]]), np.array([1])))),
        ("-log_softmax(logits)", "log_softmax(logits)"), (TEST_LOSSES, "cross_entropy")),
    Exercise(
        "embed-tokens", GEMMA, "embed_tokens", "the language model", "look tokens up, and scale them for the decoder",
        "The table is the output head as well, so its rows are short: without √D the picture outweighs the text.",
        ("`embed` reads the rows.", "Multiply by math.sqrt(cfg.hidden_size): np.sqrt would give float64."),
        (Case("Multiply by the root of the width: the table doubles as the output head.", embedding_inputs),),
        (" * math.sqrt(cfg.hidden_size)", ""), (TEST_MODEL, "scaled")),
    Exercise(
        "gated-mlp", GEMMA, "mlp", "non-linearity", "Gemma's MLP: a gate decides how much of `up` passes",
        "GELU belongs to the gate. On `up` it has the same shape and another model.",
        ("Three matrices: gate_proj, up_proj, down_proj.", "down(gelu(gate(x)) · up(x))."),
        (Case("GELU acts on the gate alone; the two are multiplied, then projected down.", decoder_inputs),),
        ("gelu(gate) * up", "gate * gelu(up)"), ("tests/test_golden.py", "paligemma1")),
    Exercise(
        "rope", OPS, "rope", "rotary positions", "turn each pair of features by an angle that grows with the position",
        "The checkpoint pairs feature i with i + H/2, not with its neighbor.",
        ("Pair i turns by position · theta^(-2i/H).", "(a, b) becomes (a cos - b sin, b cos + a sin).",
         "Make the angles in float64 and turn cos and sin into x's type."),
        (Case("Feature i is paired with feature i + H/2 (half-split), not with its neighbor.",
              lambda rng: (rng.standard_normal((2, 3, 2, 8)), rng.integers(0, 50, (2, 3)), 1e4)),
         Case("Angles far out need float64: position 8000 in float32 is already off.",
              lambda rng: (rng.standard_normal((1, 1, 1, 8)).astype(np.float32), np.array([[8000]]), 1e4))),
        ("x[..., :half], x[..., half:]", "x[..., ::2], x[..., 1::2]"), (TEST_OPS, "rope")),
    Exercise(
        "kv-cache", GEMMA, "KVCache.store", "KV cache",
        "write the keys and values of new tokens, hand back all of them",
        "The new token must see everything before it, not itself alone.",
        ("`reserve` has counted the new tokens already: they are the last ones up to self.length.",),
        (Case("Give back the keys and values of ALL tokens so far, the new ones last.", cache_inputs, stored),),
        ("return self.keys[layer][:, :self.length]", "return self.keys[layer][:, slots]"), (TEST_MODEL, "cache")),
    Exercise(
        "prefix-lm-mask", GEMMA, "prefix_lm_mask", "prefix-LM mask", "say who may look at whom",
        "PaliGemma is not causal in the prefix: the picture looks at the question.",
        ("A key is seen if it is not later, or if both are in the prefix.",
         "Position -1 is padding, which is never a key.",
         "A window hides keys that are `window` or more behind; inside the prefix it hides nothing."),
        (Case("Inside the prefix everybody sees everybody; behind it, only what came before.",
              lambda rng: (np.arange(5)[None], np.arange(5)[None], np.array([3]))),
         Case("Padding, at position -1, is never a key.", positions),
         Case("The window concerns what is written, not the prefix.", lambda rng: (*positions(rng), 2))),
        ("(causal | both_in_prefix)", "causal"), (TEST_OPS, "mask")),
    Exercise(
        "output-logits", GEMMA, "output_logits", "the language model", "score every token of the vocabulary",
        "Gemma 2 bends the scores with a soft cap. The best token stays the best, so no text shows that it is missing.",
        ("A dot product with every row of the table.", "The cap: cap · tanh(logits / cap), if the config has one."),
        (Case("Without a cap: the dot product with every row.",
              lambda rng: (rng.standard_normal((2, 4)), rng.standard_normal((7, 4)), Caps(None))),
         Case("With a cap: cap · tanh(logits / cap).",
              lambda rng: (5 * rng.standard_normal((2, 4)), rng.standard_normal((7, 4)), Caps(3.0)))),
        ("is not None", "is None and False"), ("tests/test_golden.py", "paligemma2 and logits")),
    Exercise(
        "decode-step", PALIGEMMA, "decode", "KV cache", "add written tokens after a prefill, score what follows",
        "Positions go on where the prefix ended. One too far still writes perfect captions, and every box is wrong.",
        ("Embed the tokens, give them their positions, through the decoder with the cache, then the output head.",
         "The n-th written token stands at cache.prefix_len + n, counted from 0; `cache.written` counts them."),
        (Case("The first written token stands at position prefix_len, the next one behind it.", decode_inputs,
              two_steps),),
        ("cache.prefix_len[:, None] + steps", "cache.prefix_len[:, None] + steps + 1"), (TEST_MODEL, "cache")),
    Exercise(
        "nucleus", SAMPLING, "candidates", "decoding", "temperature, top-k and top-p: which tokens may be drawn",
        "The nucleus holds the token with which the sum reaches p. Leave it out, and a sure model has nothing to draw.",
        ("Temperature first, then top-k, then the nucleus of what is left.",
         "Of equal logits the lower id comes first.",
         "Keep every token up to AND INCLUDING the first with which the sum of probabilities reaches p."),
        (Case("Likeliest first, probabilities of softmax(logits / temperature).",
              lambda rng: (rng.standard_normal(9), 0.7, None, 1.0)),
         Case("top-k keeps the k likeliest.", lambda rng: (rng.standard_normal(9), 1.3, 4, 1.0)),
         Case("The token with which the sum reaches p is kept as well.",
              lambda rng: (np.log([0.6, 0.3, 0.1]), 1.0, None, 0.8))),
        ("1 + np.count_nonzero", "np.count_nonzero"), ("tests/decoding/test_sampling.py", "candidates or nucleus")),
    Exercise(
        "boxes", BOXES, "parse", "detection and segmentation as text", "read the boxes that an answer spells",
        "The order is ymin, xmin, ymax, xmax, unlike that of every drawing library.",
        ("`_OBJECT` finds runs of <loc>, of <seg>, and a label.", "A location is a share of the side: n / 1023.",
         "Leave out what is no valid box: four locations, ymax above ymin, xmax above xmin."),
        (Case("y comes first: ymin, xmin, ymax, xmax.",
              lambda rng: ("<loc0100><loc0200><loc0900><loc0500> cat", 40, 30)),
         Case("Several objects, with a broken one among them.",
              lambda rng: ("<loc0001><loc0002><loc0900><loc0500> a ; <loc0005>b ; <loc0000><loc0000><loc1023><loc1023>",
                           9, 7))),
        ("y0, x0, y1, x1 = locations", "x0, y0, x1, y1 = locations"),
        ("tests/outputs/test_boxes.py", "object or box")),
    Exercise(
        "softmax-backward", BACKWARD, "softmax", "training", "the gradient of softmax, by hand",
        "Every output of a row depends on every input of it: dy · y · (1 - y) is the diagonal alone.",
        ("dy/dx is diag(y) - y yᵀ.", "dx = y · (dy - Σ dy · y), the sum along the row."),
        (Case("All of a row depends on all of it: subtract the row's sum of dy · y.", normal(3, 4), forward_and_pull),),
        ("y * (dy - (dy * y).sum(-1, keepdims=True))", "y * (1 - y) * dy"), (TEST_BACKWARD, "softmax")),
    Exercise(
        "linear-backward", BACKWARD, "linear", "training", "the gradients of a linear map, by hand",
        "A weight is used by every token: its gradient is the sum over all of them.",
        ("dx = dy W.", "dW = the sum over tokens of dy xᵀ: one matrix product.", "db = the sum over tokens of dy."),
        (Case("The bias is used by every token, so its gradient is a sum, not a mean.",
              lambda rng: (rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)),
              forward_and_pull),
         Case("Without a bias there is no gradient for one.",
              lambda rng: (rng.standard_normal((3, 4)), rng.standard_normal((5, 4))),
              forward_and_pull)),
        ("dy.sum(0)", "dy.mean(0)"), (TEST_BACKWARD, "linear")),
]


class Caps:
    """A config of which only the soft cap is read."""

    def __init__(self, cap):
        self.final_logit_softcapping = cap
