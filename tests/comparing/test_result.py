"""What `ad.compare` returns is the record, with the arm to take."""

from tests.comparing.test_choose import a_record

from addenda.comparing.choose import choose
from addenda.comparing.record import Record
from addenda.comparing.result import Result


def test_a_result_is_the_record_and_chooses(tmp_path):
    record = a_record(tmp_path, {"lora": (0.5, (3, 1, 3)), "shira": (0.5, (1, 3, 1))})
    result = Result.read(tmp_path)
    assert isinstance(result, Record) and isinstance(result, Result)
    assert (result.config, sorted(t.name for t in result.trials)) == (
        record.config, sorted(t.name for t in record.trials)
    )  # fmt: skip
    assert result.choice == choose(record, "memory") and result.choice.arm == "shira"
    assert {cost: c.arm for cost, c in result.choices.items()} == {"memory": "shira", "size": "lora", "time": "shira"}
    assert result.choices is result.choices, "computed once"
