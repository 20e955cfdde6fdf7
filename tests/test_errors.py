"""What an error may say of an address."""

import pytest

from configs.errors import bare_address, line, named_line, without_credentials


@pytest.mark.parametrize(
    "password", ["secret", "sec@ret", "sec/ret", "s@ec/r@et", "sec?ret", "sec#ret", "sec:ret", "1/sec@ret", "[sec]ret"]
)
def test_no_part_of_a_password_is_printed(password: str) -> None:
    for address in (f"postgresql://ann:{password}@db.example:5432/mlflow", f"http://ann:{password}@db.example:5000"):
        for said in (
            bare_address(address),
            without_credentials(f"no answer from '{address}' (try again)"),
            named_line(OSError(f"{address} is away")),
        ):
            assert "db.example" in said
            assert not [part for part in ("ann", "sec", "ret") if part in said]


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1",
        "sqlite:////home/me/mlflow.db",
        "sqlite:///C:/me@home/mlflow.db",
        "http://[::1]:5000/health",
        "https://hub.example/me/tiny@main",
        "me@example.org wrote http://example.org",
        "s3://bucket/a@b",
    ],
)
def test_an_address_without_credentials_is_left_as_it_is(text: str) -> None:
    assert without_credentials(text) == text


def test_secrets_in_a_query_are_not_printed() -> None:
    said = line(OSError("https://cdn.example/x?X-Amz-Signature=abc&part=1 and postgresql://db/m?user=ann&password=abc"))
    assert said == "https://cdn.example/x?X-Amz-Signature=…&part=1 and postgresql://db/m?user=ann&password=…"
