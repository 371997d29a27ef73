from pathlib import Path

import pytest

from matchai.system.errors import InputError
from matchai.system.optional_packages import need


def test_an_installed_module_is_given() -> None:
    assert need("json.decoder", "medical", "Reading").JSONDecoder


def test_a_missing_module_names_the_command_that_mends_it() -> None:
    with pytest.raises(
        InputError, match=r'^Reading NIfTI files needs nonesuch, .* `pip install "matchai\[medical\]"`\.$'
    ):
        need("nonesuch.part", "medical", "Reading NIfTI files")


@pytest.mark.parametrize(
    ("line", "said"), [("import nonesuch", "nonesuch"), ("raise ImportError('libx.so')", "libx.so")]
)
def test_a_module_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    name = f"broken_{said.partition('.')[0]}"
    (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"needs {name}.*{said}"):
        need(name, "medical", "Reading")
