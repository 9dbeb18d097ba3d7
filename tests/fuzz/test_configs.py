"""Configurations, overrides, and the command lines of all commands."""

import pytest
import yaml

from jitscale.config.schema import SETTINGS
from tests.support.fuzzing import TEXTS, Command, Fuzzer, Mutator, tool
from tests.support.tiny import model_yaml

pytestmark = pytest.mark.slow

CONFIG = f"""
{model_yaml()}
data: {{batch_size: 4, num_workers: 0, shards: nowhere}}
optim: {{lr: 1.0e-3, schedule: cosine, warmup_images: 48}}
engine: {{precision: fp32}}
ema: {{decays: [0.9, 0.99]}}
evaluation: {{weights: ema_0.9, sweep: ["guidance=1:2:0.5", ema=all], guidance_interval: [0.1, 1.0], more_features: []}}
progressive: {{resolutions: [8], images: [40]}}
run: {{max_images: 80, device: cpu}}
"""


def test_configs_and_overrides(fuzz: Fuzzer) -> None:
    path, base = fuzz.inputs / "config.yaml", yaml.safe_load(CONFIG)
    (fuzz.inputs / "defaults.yaml").write_text("optim: {lr: 2.0e-3}\n")

    def command(mutator: Mutator, *overrides: str) -> Command:
        plain = ["--config", str(path), *overrides]
        if mutator.often(0.2):
            return tool("plan", [*plain, "--gpus", "4", "--gpu-memory", "80GB"])
        return tool("jitscale.train", [*plain, "--print-config"])

    def file(mutator: Mutator) -> Command:
        content = dict(base)
        if mutator.often(0.2):
            content["defaults"] = mutator.random.choice(
                [["defaults"], ["config"], [mutator.hostile()], mutator.hostile()]
            )
        if mutator.often(0.3):
            section = mutator.random.choice(list(SETTINGS)).split(".")
            content[section[0]] = {**content.get(section[0], {}), ".".join(section[1:]): mutator.hostile()}
        path.write_bytes(yaml.safe_dump(mutator.tree(content)).encode(errors="surrogatepass"))
        return command(mutator)

    def text(mutator: Mutator) -> Command:
        path.write_bytes(mutator.changed_bytes(CONFIG.encode()))
        return command(mutator)

    def override(mutator: Mutator) -> Command:
        path.write_text(CONFIG)
        if not mutator.active:
            return command(mutator, "optim.lr=1e-4")
        key = mutator.random.choice([*SETTINGS] * 3 + [key.split(".")[0] for key in SETTINGS] + TEXTS)
        return command(
            mutator, mutator.random.choice([f"{key}={mutator.text()}"] * 8 + [key, mutator.text()]).replace("\0", "")
        )

    fuzz.run("config, values", 250, file)
    fuzz.run("config, bytes", 200, text)
    fuzz.run("override", 250, override)
    fuzz.finish()
