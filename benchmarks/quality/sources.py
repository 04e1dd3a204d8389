"""Sources: the files that the caller names. Nothing that is measured on is ever fitted on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_SENTENCES = re.compile(r"(?<= [.?!]) |\n")  # of WikiText: between a full stop and what follows it


@dataclass(frozen=True)
class Sources:
    """Paths.

    Args:
        fit, test: plain text, WikiText-2's validation and test part.
        pairs: csv of STS-B's test pairs: sentence, sentence, score.
        wordnet: folder of WordNet's data files (Debian's package wordnet-base).
        pictures: folder of Fashion-MNIST's four .gz files.
    """

    fit: Path | None = None
    test: Path | None = None
    pairs: Path | None = None
    wordnet: Path | None = None
    pictures: Path | None = None

    def sentences(self) -> list[str]:
        """Return those of `fit`, and WordNet's examples with a third of its glosses, so that none of them outweighs the others.

        Raises:
            SystemExit: a file was not named.
        """
        if self.fit is None or self.wordnet is None:
            raise SystemExit(
                "sentences need --fit-text and --wordnet (Debian's package wordnet-base: /usr/share/wordnet)"
            )
        found = [s for s in _SENTENCES.split(self.fit.read_text("utf8")) if len(s.split()) > 4]
        senses = [
            line.rpartition(" | ")[2]
            for file in sorted(self.wordnet.glob("data.*"))
            for line in file.read_text("ascii").splitlines()
            if not line.startswith("  ")  # the licence
        ]
        examples = [e for s in senses for e in re.findall(r'"([^"]+)"', s)]
        glosses = [re.sub(r'; "[^"]*"', "", s).strip() for s in senses[::3]]
        return [*found, *(s for s in (*examples, *glosses) if len(s.split()) > 3)]
