"""What `export` makes of runs, where it puts it, and what it would upload."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from acestep_ray import cli
from acestep_ray.config import ExportConfig
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export import hub
from acestep_ray.export.card import CARD, NOTES_KEY, PICTURE, _release_fingerprint
from acestep_ray.export.job import export
from acestep_ray.export.lora import ADAPTER_NAME, merge_loras
from acestep_ray.export.reading import LORA_FILE, open_lora
from acestep_ray.models.checkpoint import ACE_STEP_V1, TRANSFORMER
from acestep_ray.storage import Store
from acestep_ray.training.experiment import FINGERPRINTS, IDENTITY_FILE
from acestep_ray.training.lora_config import DEFAULT_LORA
from tests.cache.rows import reject, song_row, write_rows
from tests.export.conftest import RSLORA, largest_difference, velocity
from tests.loras import write_lora

TWO = {
    "adapters": {
        "style": {**DEFAULT_LORA, "r": 4, "target_modules": ["to_q", "to_v"]},
        "voice": {**RSLORA, "r": 2, "target_modules": ["speaker_embedder", "to_q"]},
    }
}


def exported(source, directory, **settings):
    return export(ExportConfig(str(source), str(directory), **settings))


def played(checkpoint, *places):
    model = checkpoint.load_transformer()
    merge_loras(model, [(place, 1.0) for place in places])
    return velocity(model)


def test_of_a_run_the_last_the_best_or_any_checkpoint_is_exported(tmp_path, checkpoint, trained, write_run):
    models = {step: trained(DEFAULT_LORA, seed=step) for step in (10, 20, 30)}
    run = write_run(models, DEFAULT_LORA)
    for chosen, step in (("last", 30), ("best", 20), ("10", 10)):
        directory = exported(run, tmp_path / chosen, checkpoint=chosen).directory
        assert largest_difference(played(checkpoint, directory), velocity(models[step])) < 1e-5
        card = (directory / CARD).read_text()
        assert f"after {step} steps" in card
        assert f"| training | 3.0000 | {3 - step / 50:.4f} |" in card  # nothing of what came later
    with pytest.raises(InputError, match=r"(?s)no such checkpoint.*last, best, or a step: 10, 20, 30"):
        exported(run, tmp_path / "none", checkpoint="15")
    step = exported(run / "checkpoints" / "step=10", tmp_path / "step").directory
    assert largest_difference(played(checkpoint, step), velocity(models[10])) < 1e-5


def test_several_adapters_become_a_file_each_that_add_up(tmp_path, checkpoint, trained, write_run):
    model = trained(TWO)
    summary = exported(write_run({5: model}, TWO), tmp_path / "out", format="kohya")
    assert {"style/my_run-step5-style.safetensors", "voice/my_run-step5-voice.safetensors"} <= set(
        summary.files
    )
    both = played(checkpoint, tmp_path / "out" / "style", tmp_path / "out" / "voice")
    assert largest_difference(both, velocity(model)) < 1e-5


def test_a_damaged_checkpoint_and_a_run_without_a_lora_are_refused(tmp_path, checkpoint, trained, write_run):
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    file = run / "checkpoints" / "step=5" / LORA_FILE
    file.write_bytes(file.read_bytes()[:-4] + b"1234")
    with pytest.raises(InputError, match="is not what training wrote"):
        exported(run, tmp_path / "out")
    model = checkpoint.load_transformer()
    whole = write_run({5: model.requires_grad_(False)}, None, name="whole")
    with pytest.raises(InputError, match=r"(?s)the model's own weights.*export extract"):
        exported(whole, tmp_path / "out")


def test_the_card_tells_songs_settings_and_losses_but_no_places(tmp_path, trained, write_run):
    rows = [song_row("a", frames=3600), song_row("b", frames=3600)]
    cache = write_rows(Store.at(tmp_path / "cache"), rows, [reject("c")])
    lora = {**DEFAULT_LORA, "r": 4}
    run = write_run({5: trained(lora)}, lora, dataset_path=cache.url, learning_rate=3e-4)
    directory = exported(run, tmp_path / "out").directory
    text = (directory / CARD).read_text()
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["pipeline_tag"] == "text-to-audio"
    assert "base_model" not in yaml.safe_load(head)  # the tiny checkpoint is not the released one
    assert "2 songs, 0.20 hours." in body
    assert "Songs that could not be used: 1." in body
    assert "| `learning_rate` | 0.0003 |" in body
    assert "| `r` | 4 |" in body
    assert "| training | 3.0000 | 2.9000 |" in body
    assert "| held-out songs | 1.9500 | 1.9500 |" in body
    assert str(tmp_path) not in text
    picture = np.asarray(Image.open(directory / PICTURE).convert("RGB"))
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    notes = json.loads(open_lora(directory / LORA_FILE).metadata[NOTES_KEY])
    assert notes["songs"]["songs"] == 2
    assert notes["settings"]["learning_rate"] == 3e-4


def test_a_run_on_the_released_model_names_it_as_its_base(tmp_path, trained, write_run):
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    identity = json.loads((run / IDENTITY_FILE).read_text())
    identity[FINGERPRINTS["transformer"]] = _release_fingerprint()
    (run / IDENTITY_FILE).write_text(json.dumps(identity))
    card = (exported(run, tmp_path / "out").directory / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ACE_STEP_V1.repository


def test_the_released_models_fingerprint_is_that_of_its_files(checkpoint, monkeypatch):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        content = (checkpoint.path / TRANSFORMER / name).read_bytes()
        monkeypatch.setitem(ACE_STEP_V1.files, f"{TRANSFORMER}/{name}", hashlib.sha256(content).hexdigest())
    assert _release_fingerprint() == checkpoint.fingerprint("transformer")


def test_a_card_is_written_without_songs_and_logs_too(tmp_path, trained, write_run):
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    for file in (tmp_path / "exps" / "logs" / "my_run").iterdir():
        file.unlink()
    text = (exported(run, tmp_path / "out").directory / CARD).read_text()
    assert "songs were not at hand" in text
    assert "| held-out songs | 1.9500 | 1.9500 |" in text  # the checkpoint holds them itself
    assert "| training |" not in text


def test_a_lora_of_somebody_gets_no_card(tmp_path, trained):
    summary = exported(write_lora(tmp_path, trained(DEFAULT_LORA), ADAPTER_NAME), tmp_path / "out")
    assert summary.files == [LORA_FILE]


def test_the_winner_of_a_search_is_a_lora_though_it_has_settings_too(tmp_path, trained):
    path = write_lora(tmp_path, trained(DEFAULT_LORA), ADAPTER_NAME)
    (tmp_path / "train.yaml").write_text("max_steps: 1\n")
    assert exported(tmp_path, tmp_path / "out").files == [LORA_FILE]
    path.unlink()
    with pytest.raises(InputError, match="no checkpoint yet"):
        exported(tmp_path, tmp_path / "other")


def test_a_dry_run_says_what_would_be_uploaded_and_uploads_nothing(
    tmp_path, trained, write_run, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "HfApi", None)  # using it would fail
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    arguments = ["export", "--input_path", str(run), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*arguments, "--push_to_hub", "somebody/my-lora", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded; somebody/my-lora would get" in said
    for name in (LORA_FILE, CARD, PICTURE):
        assert f"{name}  {(tmp_path / 'out' / name).stat().st_size:,} bytes" in said


def test_the_upload_is_one_commit_of_all_files_to_a_private_repository(
    tmp_path, trained, write_run, monkeypatch
):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append(("create", repository, options))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(hub, "HfApi", Api)
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    summary = exported(run, tmp_path / "out", push_to_hub="somebody/my-lora")
    assert calls == [
        ("create", "somebody/my-lora", {"private": True, "exist_ok": True}),
        ("upload", "somebody/my-lora", sorted([CARD, PICTURE, LORA_FILE])),
    ]
    assert "uploaded https://huggingface.co/somebody/my-lora" in summary.render()


def test_an_upload_that_fails_keeps_what_was_exported_and_says_what_to_do(tmp_path, trained, monkeypatch):
    class Api:
        def create_repo(self, repository, **options):
            raise hub.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(hub, "HfApi", Api)
    path = write_lora(tmp_path, trained(DEFAULT_LORA), ADAPTER_NAME)
    with pytest.raises(AceStepError, match=r"(?s)no token.*hf auth login"):
        exported(path, tmp_path / "out", push_to_hub="somebody/my-lora")
    assert (tmp_path / "out" / LORA_FILE).is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "kohia"}, "unknown format: --format kohia(?s:.*)universal, peft, comfyui, kohya"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dry_run": True}, "no upload to try"),
        ({"push_to_hub": "mine"}, "no name of a repository(?s:.*)USER/NAME"),
        ({"push_to_hub": "a b/c"}, "no name of a repository"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        exported(tmp_path / "nowhere", tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_written_over(tmp_path, trained):
    path = write_lora(tmp_path, trained(DEFAULT_LORA), ADAPTER_NAME)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"(?s)there is something here.*another directory"):
        exported(path, tmp_path)
    assert path.read_bytes() == before


def test_an_export_that_fails_leaves_nothing(tmp_path, trained, write_run, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("acestep_ray.export.job.write_card", fail)
    run = write_run({5: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="disk is full"):
        exported(run, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
