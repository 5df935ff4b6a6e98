"""Checkpoints for the command-line tests, with the standard library alone: reading a model folder, changing its
header, tensors or settings, and writing it again, well-formed or not."""
import array
import copy
import json
import math
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile


class Model:
    """A folder with one model.safetensors, in memory. header: {name: {dtype, shape, data_offsets}}."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        raw = (self.folder / "model.safetensors").read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        self.header = json.loads(raw[8:8 + n])
        self.data = bytearray(raw[8 + n:])
        self.config = json.loads((self.folder / "config.json").read_text())

    def names(self):
        return [name for name in self.header if name != "__metadata__"]

    def put(self, name, offset, values):
        """Overwrites bytes of a tensor's data."""
        begin = self.header[name]["data_offsets"][0] + offset
        self.data[begin:begin + len(values)] = values

    def converted(self, dtype):
        """The same model with its BF16 tensors as F32 or, rounded, F16."""
        data, header = bytearray(), {k: v for k, v in self.header.items() if k == "__metadata__"}
        for name in self.names():
            begin, end = self.header[name]["data_offsets"]
            words = array.array("I", (w << 16 for w in array.array("H", bytes(self.data[begin:end]))))
            values = array.array("f", words.tobytes())
            new = values.tobytes() if dtype == "F32" else struct.pack(f"<{len(values)}e", *values)
            header[name] = self.header[name] | {"dtype": dtype, "data_offsets": [len(data), len(data) + len(new)]}
            data += new
        self.header, self.data = header, data
        return self

    def write(self, folder, header=None, raw_header=None, header_bytes=None, data=None, config=None):
        """Writes the folder; each argument replaces what would be written there."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True)
        for file in self.folder.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                shutil.copy(file, folder)
        text = config if isinstance(config, bytes) else json.dumps(config or self.config).encode()
        (folder / "config.json").write_bytes(text)
        head = raw_header if raw_header is not None else json.dumps(header or self.header).encode()
        with open(folder / "model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(head) if header_bytes is None else header_bytes))
            f.write(head)
            f.write(self.data if data is None else data)
        return folder


def run(*command, timeout=120, **options):
    """(exit code, stdout, stderr)"""
    p = subprocess.run([str(c) for c in command], capture_output=True, text=True, errors="replace",
                       timeout=timeout, **options)
    return p.returncode, p.stdout, p.stderr


def flip(m, name, offset, mask):
    """Flips bits in a 16-bit word of a tensor."""
    begin = m.header[name]["data_offsets"][0] + offset
    m.put(name, offset, struct.pack("<H", struct.unpack_from("<H", m.data, begin)[0] ^ mask))


def pack(m, names):
    """Keeps these tensors alone, end to end."""
    data, header = bytearray(), {k: v for k, v in m.header.items() if k == "__metadata__"}
    for name in names:
        begin, end = m.header[name]["data_offsets"]
        header[name] = m.header[name] | {"data_offsets": [len(data), len(data) + end - begin]}
        data += m.data[begin:end]
    m.header, m.data = header, data


# --- a mixture of experts ---

def mixture_shapes(c):
    """{name: shape} of the language model that the settings describe"""
    h, heads, kv = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], h], "model.norm.weight": [h]}

    def mlp(module, width):
        for name, shape in (("gate", [width, h]), ("up", [width, h]), ("down", [h, width])):
            shapes[f"{module}.{name}_proj.weight"] = shape
    for i in range(c["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name in ("input", "post_attention", "pre_feedforward", "pre_feedforward_2", "post_feedforward",
                     "post_feedforward_1", "post_feedforward_2"):
            word, number = (name[:-2], name[-2:]) if name[-1].isdigit() else (name, "")
            shapes[f"{block}.{word}_layernorm{number}.weight"] = [h]
        for name, shape in (("q", [heads, h]), ("k", [kv, h]), ("v", [kv, h]), ("o", [h, heads])):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = shape
        for name in "qk":
            shapes[f"{block}.self_attn.{name}_norm.weight"] = [c["head_dim"]]
        shapes |= {f"{block}.layer_scalar": [1], f"{block}.router.proj.weight": [c["num_experts"], h],
                   f"{block}.router.scale": [h], f"{block}.router.per_expert_scale": [c["num_experts"]]}
        mlp(f"{block}.mlp", c["intermediate_size"])
        for e in range(c["num_experts"]):
            mlp(f"{block}.experts.{e}", c["moe_intermediate_size"])
    return shapes


def mixture(folder, rng, layers, experts, top, width, hidden):
    """Puts a small Gemma 4 with random weights in the place of a folder's model; the tokenizer stays."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    c = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": "bfloat16", "vocab_size": vocab,
         "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": hidden, "intermediate_size": 128,
         "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": layers, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 64, "global_head_dim": 64, "sliding_window": 64,
         "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
         "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "max_position_embeddings": 256,
         "enable_moe_block": True, "num_experts": experts, "top_k_experts": top, "moe_intermediate_size": width,
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
         "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                             "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}
    header, data = {}, bytearray()
    for name, shape in mixture_shapes(c).items():
        n = math.prod(shape)
        values = [rng.gauss(0, shape[-1] ** -0.5) for _ in range(n)] if len(shape) == 2 else [1] * n
        words = array.array("H", (w >> 16 for w in array.array("I", array.array("f", values).tobytes())))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + 2 * n]}
        data += words.tobytes()
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    (folder / "config.json").write_text(json.dumps(c))


# --- random damage ---

VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1e300, -1e300, 2**31, 2**53, 2**63, "", "x", "bfloat16", [], {}, [1],
          {"a": 1}, ["full_attention"], "sliding_attention", "\u0000", "é" * 200]


def random_member(rng, value):
    """A random place in a JSON value: (container, key)."""
    places = []

    def walk(v):
        for k in (v if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ()):
            places.append((v, k))
            walk(v[k])
    walk(value)
    return rng.choice(places)


def change_member(rng, value):
    container, key = random_member(rng, value)
    how = rng.randrange(4)
    if how == 0 and isinstance(container, dict):
        del container[key]
    elif how == 1 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = container[key] + rng.choice([-1, 1, 128, -128]) if rng.random() < .7 else -container[key]
    elif how == 2 and isinstance(container, dict):
        container[rng.choice(list(container))] = copy.deepcopy(container[key])
    else:
        container[key] = rng.choice(VALUES)


def flip_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


class Tests:
    """Cases run one by one, each with a fresh folder inside one for all; with --short among the arguments without those
    that are marked as slow, for builds that are many times slower."""

    def __init__(self, prefix):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
        self.passed = self.failed = 0

    def need(self, *command):
        """Something that all cases rest on."""
        code, _, stderr = run(*command)
        if code:
            shutil.rmtree(self.folder)
            raise SystemExit(stderr)

    def slow(self, f):
        if "--short" in sys.argv:
            print(f"not run {f.__name__} (--short)", flush=True)
        else:
            self.case(f)

    def case(self, f, *makers):
        """f(its folder, what each maker returns)"""
        tmp = self.folder / f.__name__
        tmp.mkdir()
        try:
            f(tmp, *(make() for make in makers))
            self.passed += 1
            print(f"ok      {f.__name__}", flush=True)
        except AssertionError as e:
            self.failed += 1
            print(f"FAILED  {f.__name__}: {e}", flush=True)
        finally:
            shutil.rmtree(tmp)

    def finish(self):
        shutil.rmtree(self.folder)
        print(f"{self.passed} passed, {self.failed} failed")
        return 1 if self.failed or not self.passed else 0
