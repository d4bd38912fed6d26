"""What the judge wrote, read again."""

import json

import pytest

from rotopo.errors import InputError
from rotopo.judge.judgement import read_judgement
from tests.report import report_inputs as inputs


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("level", None, "'level' is missing"),
        ("level", 95, "level is 95: it has to lie between 0 and 1"),
        ("tie", "0", "'tie' is of the wrong kind"),
        ("resamples", 0.5, "'resamples' is of the wrong kind"),
        ("seed", [0], "'seed' is of the wrong kind"),
    ],
)
def test_a_judgements_settings_are_checked(tmp_path, field, value, message):
    file = inputs.save_judgement(tmp_path / "judged") / "judge.json"
    result = json.loads(file.read_text())
    del result[field]
    file.write_text(json.dumps(result if value is None else result | {field: value}))
    with pytest.raises(InputError, match=message):
        read_judgement(file.parent)
