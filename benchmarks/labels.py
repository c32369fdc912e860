"""How the arms of these experiments are called and drawn, beside the trainer's own."""

from python_trainer.plots import STYLES, style

__all__ = ["style"]

# After which of the trainer's they come.
OWN = {
    "dgg": {
        "dgg@1": ("DGG, τ = 1", "#0072B2", "--"),
        "dgg_squared": ("DGG, squared norm", "#0072B2", "--"),
    },
    "shuffled": {
        "local_dgg": ("DGG's counts, shuffled among 16", "#CC79A7", "-"),
        "local_gain": ("Gain gate's counts, shuffled among 16", "#CC79A7", ":"),
        "shuffled_squared": ("DGG's counts, squared norm, shuffled", "#CC79A7", "-."),
        "shuffled_gain": ("Gain gate's counts, shuffled", "#CC79A7", ":"),
        "shuffled_log_ratio": ("Log-ratio gate's counts, shuffled", "#CC79A7", "--"),
        "shuffled_kl": ("KL stop's counts, shuffled", "#CC79A7", ":"),
        "falling": ("Uses 8, 4, 2, 1", "#000000", "-."),
        "rising": ("Uses 1, 2, 4, 8", "#000000", ":"),
    },
    "middle_norm": {"tempered": ("Tempered re-use", "#777777", "-.")},
    "zclip": {
        "oracle": ("Hindsight oracle", "#000000", ":"),
        "all_uses": ("Fixed K=8, effects recorded", "#D55E00", ":"),
    },
}

for _name, _look in list(STYLES.items()):
    del STYLES[_name]
    STYLES.update({_name: _look, **OWN.get(_name, {})})
STYLES["shuffled"] = ("DGG's counts, shuffled", "#CC79A7", "-")
