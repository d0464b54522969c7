"""A network of the user's as a predictor: what it leaves out is filled in (predictor.Predictor and MapPredictor).

flow   velocity and decode: a rectified flow whose state is as large as the photo and starts from noise
map    predict: one step. The state is the map over `scale`. It starts at 0 with v = -predict / scale, so one Euler step
       ends at the map, and exploration adds noise of std --noise to it, a share of the scale.
       The scale is the spread (std over pixels) of the frozen start's map of the photo, so it never moves with the
       policy; 1 outside training, where it cancels
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import lora
from models.copies import frozen_copy
from models.depth_families import AFFINE, SIGN
from models.schedule import uniform_times
from relations import MODALITIES, NAMES
from runtime.files import write_json, write_tensors, write_text
from runtime.weights import OWN_WEIGHTS

ARCHITECTURE = "own"               # in predictor.json: a class of the user's, named on the command line alone


class FlowWrapper(nn.Module):
    """A network that offers predictor.Predictor, with the rest filled in. name: its SPEC."""

    replays = False
    encodes_alike = False              # whether all copies of it encode a photo alike, policy and reference

    def __init__(self, network, name):
        super().__init__()
        self.network = network
        self.cfg = name
        self.modalities = tuple(network.modalities)
        self.walks = tuple((m,) for m in self.modalities)                       # modalities that one walk gives
        self.size = network.size
        self.multiple = getattr(network, "multiple", 1)
        self.exploration = getattr(network, "exploration", "flow")
        self.lora_targets = getattr(network, "lora_targets", _linear_layers(network))
        self.depth_means = getattr(network, "depth_means", AFFINE)
        if self.depth_means not in SIGN:
            raise ValueError(f"predictor: {name}: got depth_means {self.depth_means!r}; want one of {', '.join(SIGN)}")

    def begin_training(self):
        """Told once, to the copy that trains; its own copies follow it."""
        if hasattr(self.network, "begin_training"):
            self.network.begin_training()

    def checkpointing(self, on):
        """Recompute activations in the backward pass, where the network can. raises ValueError: it cannot."""
        if hasattr(self.network, "checkpointing"):
            self.network.checkpointing(on)
        elif on:
            raise ValueError(f"predictor: {self.cfg} has no `checkpointing(on)`; want one for --checkpointing")

    def shape(self, rgb):
        """Shape (c, h, w) of the state for photos (B, 3, H, W)."""
        return self.network.shape(rgb) if hasattr(self.network, "shape") else (3, *rgb.shape[-2:])

    def times(self, T):
        """T + 1 descending times from 1 to 0."""
        return self.network.times(T) if hasattr(self.network, "times") else uniform_times(T)

    def start(self, noise, T):
        """State at times(T)[0] from standard normal noise."""
        return self.network.start(noise, T) if hasattr(self.network, "start") else noise

    def encode(self, rgb):
        """Condition of photos (B, 3, H, W): the photos themselves, if the network has no `encode`."""
        return self.network.encode(rgb) if hasattr(self.network, "encode") else rgb

    def velocity(self, x, t, cond, modality):
        """v of states x (B, c, h, w) at t (B,); modality: a name, or (B,) index in NAMES of each state."""
        if isinstance(modality, str):
            return self._velocity(x, t, cond, modality)
        index = modality.unique().tolist()
        if len(index) == 1:
            return self._velocity(x, t, cond, NAMES[index[0]])
        v = torch.empty_like(x, dtype=torch.float32)
        for i in index:
            rows = modality == i
            v[rows] = self._velocity(x[rows], t[rows], cond[rows], NAMES[i]).float()
        return v

    def _velocity(self, x, t, cond, modality):
        return self.network.velocity(x, t, cond, modality)

    def decode(self, x, modality, cond=None):
        """Map (B, C, H, W) in the modality's encoding from a state at t = 0.

        cond  of the photos; the states of a photo lie side by side
        """
        return self.network.decode(x, modality)

    def convert_maps(self, maps):
        """Maps in the encodings of relations.MODALITIES: they already are."""
        return maps

    def save(self, folder, **about):
        """Write the weights (adapters merged) and predictor.json; or as the network's own `save(folder)` does.

        about  of the run; a network that has `card(about)`, the text of a model card, gets a README.md, and one that
               has `facts`, a dict, finds them in predictor.json
        """
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(self.network, "save"):
            self.network.save(folder)
        else:
            write_tensors(folder / OWN_WEIGHTS, {k: v.cpu() for k, v in lora.merged_state(self.network).items()})
        if hasattr(self.network, "card"):
            write_text(folder / "README.md", self.network.card(about))
        kind = getattr(self.network, "architecture", ARCHITECTURE)
        facts = getattr(self.network, "facts", {})
        write_json(folder / "predictor.json",
                   dict(architecture=kind, made_by=self.cfg.partition("=")[0], **facts, **about))
        (folder / "model_index.json").unlink(missing_ok=True)                   # of a Marigold: it would be opened


class MapWrapper(FlowWrapper):
    """A network that offers predictor.MapPredictor: one step from the photo to the map."""

    encodes_alike = True               # the scale is that of the frozen start

    def __init__(self, network, name):
        super().__init__(network, name)
        self.exploration = "map"
        self.channels = max(MODALITIES[m].channels for m in self.modalities)
        self.start_network = None                                               # frozen; in training alone

    def begin_training(self):
        """As FlowWrapper's; what the network is now gives the scale from now on."""
        super().begin_training()
        self.start_network = frozen_copy(self.network)

    def shape(self, rgb):
        """Shape (c, h, w) of the state: a map of the photo's size."""
        return self.channels, *rgb.shape[-2:]

    def times(self, T):
        """One step, whatever T."""
        return [1.0, 0.0]

    def start(self, noise, T):
        """Zero: nothing but the photo decides the map."""
        return torch.zeros_like(noise)

    @torch.no_grad()
    def encode(self, rgb):
        """The photo, and the scale of each modality's map as a plane: (B, 3 + M, H, W)."""
        scale = rgb.new_ones(len(rgb), len(self.modalities))
        if self.start_network is not None:
            for k, m in enumerate(self.modalities):
                scale[:, k] = self.start_network.predict(rgb, m).float().flatten(1).std(1).clamp_min(1e-6)
        return torch.cat((rgb, scale[..., None, None].expand(-1, -1, *rgb.shape[-2:])), 1)

    def _scale(self, x, cond, modality):
        scale = cond[:, 3 + self.modalities.index(modality), None, :1, :1]      # (B, 1, 1, 1)
        return scale.repeat_interleave(len(x) // len(cond), 0)

    def _velocity(self, x, t, cond, modality):
        maps = self.network.predict(cond[:, :3], modality)
        want = (len(cond), MODALITIES[modality].channels, *cond.shape[-2:])
        if tuple(maps.shape) != want:
            raise ValueError(f"predictor: {self.cfg} gave a {modality} map {tuple(maps.shape)}; want {want}")
        return x - maps.expand(-1, self.channels, -1, -1) / self._scale(x, cond, modality)

    def decode(self, x, modality, cond=None):
        """As FlowWrapper's; vectors are normalised, colours clipped."""
        one = MODALITIES[modality].channels
        x = x if one == self.channels else x.mean(1, keepdim=True)
        maps = x if cond is None else x * self._scale(x, cond, modality)
        kind = MODALITIES[modality].kind
        if kind == "vector":
            return F.normalize(maps, dim=1, eps=1e-6)
        return maps if kind == "distance" else maps.clamp(0, 1)


def wrap(network, name):
    """A network of the user's as a predictor. name: its SPEC, for messages.

    raises  ValueError: a member is missing, a modality is not in the table
    """
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        raise ValueError(f"predictor: {name} is a {kind}; want a torch.nn.Module")
    is_map = hasattr(network, "predict")
    for member in ("modalities", "size", *(("predict",) if is_map else ("velocity", "decode"))):
        if not hasattr(network, member):
            raise ValueError(f"predictor: {name} has no `{member}`; want modalities, size, and either predict, or "
                             "velocity and decode (docs/extend.md)")
    if not isinstance(network.size, int) or network.size < 1:
        raise ValueError(f"predictor: {name} has size {network.size!r}; want a side in px, an integer of at least 1")
    unknown = [m for m in network.modalities if m not in NAMES]
    if unknown or not network.modalities or isinstance(network.modalities, str):
        raise ValueError(f"predictor: {name} has modalities {network.modalities!r}; want a tuple of some of "
                         f"{', '.join(NAMES)}")
    return (MapWrapper if is_map else FlowWrapper)(network, name).eval()


def _linear_layers(network):
    """Last names of all linear layers: what LoRA adapts where the network names no lora_targets."""
    return tuple(sorted({name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, nn.Linear)}))
