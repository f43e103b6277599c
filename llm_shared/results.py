"""setup · write_results(): what a script has measured goes into the README pair beside it."""

from llm_shared.resources import replacing

START, END = "<!-- results -->", "<!-- end of results -->"


def with_results(text, results):
    """Return a README's text with results between its two marks; a text without them is a ValueError."""
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README holds no {START} … {END} to write the results between")
    return f"{before}{START}\n\n{results}\n\n{END}{after}"


def write_results(folder, table):
    """Put table(language), Markdown, into a folder's README.en.md (language 0) and README.md (language 1)."""
    for language, name in enumerate(("README.en.md", "README.md")):
        path = folder / name
        text = with_results(path.read_text(encoding="utf-8"), table(language))
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
