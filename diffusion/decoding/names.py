"""What other projects call the options of decoding, in one place: the command line and the documentation read it.

Names are facts of LLaDA and Fast-dLLM (``generate``), CoDD (its evaluation), dllm (its samplers), Dream
(``diffusion_generate``) and the diffusion models of vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

PROJECTS = ("LLaDA", "Fast-dLLM", "CoDD", "dllm", "Dream", "vLLM")


@dataclass(frozen=True)
class Names:
    """What one option is called.

    Attributes:
        ours: in this library; empty where it has no such option.
        theirs: by project.
        note: what differs there, or why there is no such option here.
    """

    ours: str
    theirs: dict[str, str]
    note: str = ""

    @property
    def others(self) -> list[str]:
        """All names but ours, each once."""
        spelled = {name.replace("_", "-"): name for name in self.theirs.values()}
        return [name for name in spelled if name != self.ours.replace("_", "-")]


def _of_all(name: str, *projects: str, **others: str) -> dict[str, str]:
    return dict.fromkeys(projects, name) | others


OPTIONS: tuple[Names, ...] = (
    Names(
        "num_steps",
        _of_all("steps", "LLaDA", "Fast-dLLM", "dllm", "Dream", CoDD="num_steps", vLLM="max_denoising_steps"),
    ),
    Names(
        "gen_length",
        _of_all("gen_length", "LLaDA", "Fast-dLLM", "CoDD") | _of_all("max_new_tokens", "dllm", "Dream", "vLLM"),
    ),
    Names(
        "block_length",
        _of_all("block_length", "LLaDA", "Fast-dLLM", "CoDD", dllm="block_size", vLLM="canvas_length"),
    ),
    Names("strategy", _of_all("remasking", "LLaDA", "Fast-dLLM", "dllm", CoDD="alg", Dream="alg")),
    Names("temperature", _of_all("temperature", "LLaDA", "Fast-dLLM", "dllm", "Dream", "vLLM")),
    Names("threshold", _of_all("threshold", "Fast-dLLM", "dllm", "Dream")),
    Names("entropy_bound", {"vLLM": "entropy_bound"}),
    Names("guidance", _of_all("cfg_scale", "LLaDA", "CoDD", "dllm")),
    Names("tokens_per_step", {"CoDD": "tokens_per_step"}, "num_steps is then new tokens by it, rounded up"),
    Names(
        "temperature",
        {"CoDD": "pc_temperature"},
        "tau. There it sharpens the denoiser's part alone before latents are drawn, the best tokens given them are "
        "taken, and 1 or more is ignored; here latents and tokens are tempered together, with and without the circuit",
    ),
    Names(
        "activation_threshold",
        {"CoDD": "pc_frac"},
        "gamma. There the share of masks is that of the whole batch; here each row has its own, and from 1 on the "
        "circuit is always used",
    ),
    Names("reverse_activation", {"CoDD": "reverse_frac"}, "the circuit is used above the threshold"),
    Names("head", {"CoDD": "pc_ckpt"}, "a .jpc file, a folder or a repository of the hub"),
    Names("model", {"CoDD": "llada_ckpt"}),
    Names("model", {"CoDD": "dream_ckpt"}),
    Names("dynamic_windows", {"CoDD": "dream_window"}, "windows of the circuit over what is decoded next"),
    Names("blocks", {"CoDD": "dream_block"}, "the default here; Dream without it fills the whole canvas at once there"),
    Names("shots", {"CoDD": "num_shot"}),
    Names("results", {"CoDD": "output_dir"}),
    Names("", {"Fast-dLLM": "factor"}, "no such rule here: use entropy_bound or threshold"),
    Names("", {"Dream": "alg_temp"}, "positions are chosen without noise here; strategy random draws them"),
    Names("", {"vLLM": "sampler_config"}, "give its parts: entropy_bound or threshold, temperature"),
)
"""Every option that one of the projects calls otherwise, or that this library has not."""

STRATEGIES: dict[str, str] = {
    "topprob": "top_prob",
    "origin": "random",
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
}
"""What CoDD and Dream call strategies, to the names here; Dream's ``origin`` commits a random number of them."""

MODELS: dict[str, str] = {"llada": "GSAI-ML/LLaDA-8B-Instruct", "dream": "Dream-org/Dream-v0-Instruct-7B"}
"""What CoDD calls models (``--model_alias``), to their names on the hub."""


def strategy_named(name: str | None) -> str | None:
    """Return this library's name of a strategy; an unknown one as it is."""
    return None if name is None else STRATEGIES.get(name, name)


def flags(option: str) -> tuple[str, ...]:
    """Return the command line's other names of an option, ``--like-this``, in the order of the table."""
    spelled = (other for one in OPTIONS if one.ours == option for other in one.others)
    return tuple(dict.fromkeys(f"--{name}" for name in spelled))


def elsewhere(option: str) -> str:
    """Return a sentence for the help of an option: what who calls it; nothing where all say the same."""
    said = []
    for flag in flags(option):
        who = [
            project
            for one in OPTIONS
            if one.ours == option
            for project, name in one.theirs.items()
            if name.replace("_", "-") == flag[2:]
        ]
        said.append(f"{flag} ({', '.join(dict.fromkeys(who))})")
    return f" Elsewhere: {', '.join(said)}." if said else ""


def missing() -> dict[str, str]:
    """Return the options that this library has not, by their flags, with what to do instead."""
    return {f"--{name}": one.note for one in OPTIONS if not one.ours for name in one.others}
