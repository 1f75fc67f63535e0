"""The words in which a setting is refused."""


def refuse(setting: str, value: object, allowed: str) -> ValueError:
    """The error of one setting, in the words that all of them use."""
    return ValueError(f"{setting}={value}: {allowed}")
