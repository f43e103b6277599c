"""Write a tiny GPT-2 with random weights as OpenAI wrote theirs, with TensorFlow itself: what the reader is tested on.

TensorFlow is no dependency of this project; in an environment that has it (2.21 was used):
    python ch05/02_alternative_weight_loading/tensorflow-checkpoint/make_checkpoint.py
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
HPARAMS = {"n_vocab": 97, "n_ctx": 16, "n_embd": 24, "n_head": 3, "n_layer": 2}


def random_weights(seed=2):
    """Return {OpenAI's name: float32 array}, drawn in order from one generator."""
    rng, D = np.random.default_rng(seed), HPARAMS["n_embd"]
    shapes = {"wte": (HPARAMS["n_vocab"], D), "wpe": (HPARAMS["n_ctx"], D)}
    for i in range(HPARAMS["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{i}/{norm}/g": (D,), f"h{i}/{norm}/b": (D,)}
        matrices = {"attn/c_attn": (D, 3 * D), "attn/c_proj": (D, D), "mlp/c_fc": (D, 4 * D), "mlp/c_proj": (4 * D, D)}
        for name, (d_in, d_out) in matrices.items():
            shapes |= {f"h{i}/{name}/w": (1, d_in, d_out), f"h{i}/{name}/b": (d_out,)}
    shapes |= {"ln_f/g": (D,), "ln_f/b": (D,)}
    return {f"model/{name}": rng.uniform(-0.2, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def main():
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        for name, values in random_weights().items():
            tf.get_variable(name, initializer=values, use_resource=False)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(FOLDER / "model.ckpt"), write_meta_graph=False)
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS) + "\n", encoding="utf-8")
    (FOLDER / "checkpoint").unlink()


if __name__ == "__main__":
    main()
