"""Every number that a stage may say about itself: its name, its unit, its meaning.

Stages return these and no others; reports, dashboards and alerts are made from this list.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number. Names are snake_case and never change their meaning."""

    name: str
    unit: str
    meaning: str
    detail: bool = False  # left out where a stage is told in one line


METRICS = (
    Metric("vocabulary_size", "tokens", "entries of the vocabulary, special tokens included"),
    Metric("text_bytes", "bytes", "UTF-8 text that was read; of chats, what the assistant says"),
    Metric("bytes_per_token", "bytes/token", "text in one token, on average over all documents"),
    Metric("documents", "documents", "documents or chats of the source"),
    Metric("heldout_documents", "documents", "of these, kept for evaluation"),
    Metric("tokens", "tokens", "in the documents to train on"),
    Metric("heldout_tokens", "tokens", "in the held-out documents"),
    Metric("train_loss", "nats/token", "mean cost of a target token; over the last 5% of the steps once it is done"),
    Metric("train_steps", "steps", "optimizer steps taken, those before a restart included"),
    Metric("checkpoint_step", "steps", "of the newest checkpoint: a restart goes on from it, or a newer one", True),
    Metric("train_tokens", "tokens", "positions of all global batches, padding included"),
    Metric("tokens_per_s", "tokens/s", "positions trained on in a second, median over the steps"),
    Metric("mfu", "share", "FLOPs of the model in a second (6 a weight, and attention) over peak_flops_per_s, median"),
    Metric("peak_flops_per_s", "FLOP/s", "of all workers: of a GPU as its maker says, of a CPU measured", detail=True),
    Metric("step_s", "seconds", "that a training step takes, median", detail=True),
    Metric("share_data", "share", "of the steps' time: waiting for batches", detail=True),
    Metric("share_forward", "share", "of the steps' time: the forward pass and the loss", detail=True),
    Metric("share_backward", "share", "of the steps' time: the backward pass", detail=True),
    Metric("share_exchange", "share", "of the steps' time: communication that nothing hides", detail=True),
    Metric("share_optimizer", "share", "of the steps' time: moving the weights", detail=True),
    Metric("share_other", "share", "of the steps' time: all the rest", detail=True),
    Metric("rank_skew_s", "seconds", "by which a step's own work takes the slowest worker longer, median", detail=True),
    Metric("busy_cores", "cores", "that the first worker keeps busy while it trains, median", detail=True),
    Metric("busy_gpu", "share", "of the time: the first worker's GPU runs anything at all, median", detail=True),
    Metric("peak_bytes", "bytes", "most memory of the first worker: its GPU's, else its process's", detail=True),
    Metric("grad_norm", "norm", "of the whole gradient before clipping, median over the steps", detail=True),
    Metric("skipped_steps", "steps", "that moved no weight because loss or gradient was not finite", detail=True),
    Metric("parameters", "parameters", "weights of the model, embeddings included"),
    Metric("waste", "share", "of the positions of a batch, those that are padding, plus tokens that were dropped"),
    Metric("val_bpb", "bits/byte", "bits the model needs for a byte of held-out text"),
    Metric("gzip_bpb", "bits/byte", "the same documents by gzip -9, each alone"),
    Metric("xz_bpb", "bits/byte", "the same documents by xz -9, each alone"),
    Metric("exact_match", "share", "of held-out questions, those answered letter for letter"),
    Metric("questions", "questions", "held-out questions that were asked"),
    Metric("logit_difference", "logits", "largest difference between the checkpoint and the bundle read back"),
)
UNITS = {m.name: m.unit for m in METRICS}
