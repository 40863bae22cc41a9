"""Write on, after a prompt, with a language model that was trained here.

chela generate run=runs/shakespeare-mini/… prompt="ROMEO:" tokens=500     printed as it is made
chela generate weights=shakespeare                                       in place of a run: weights that have a name
"""

from __future__ import annotations

import codecs
import signal
import sys
import time
from dataclasses import dataclass

from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.predict import NetworkOptions


@dataclass
class Options(NetworkOptions):
    """The words of the command."""

    prompt: str = option("", "what the text begins with; \\n is a new line")
    tokens: int = option(500, "symbols to make: characters or bytes, as the run was trained on", ge=1, le=1_000_000_000)
    temperature: float = option(0.8, "below 1 likely symbols become likelier; 0 takes the likeliest", ge=0, le=100)
    top_k: int = option(0, "draw from so many of the likeliest symbols; 0: from all", ge=0, le=1_000_000)
    seed: int = option(0, "the same seed, the same text", ge=0, le=2**63 - 1)


@command(Options, __doc__)
def main(options: Options) -> int:
    """Write on with a run, print the text, return the exit status."""
    prompt = options.prompt.replace("\\n", "\n").encode(errors="surrogateescape")
    from chela.models.generate import Continuation, decode, encode
    from chela.models.heads import TokenModel

    model = options.network()
    alphabet = model.built_from[1].alphabet
    if not alphabet or not isinstance(model, TokenModel):
        got = model.encoding.get("name", "another task")
        raise UsageError(f"run: expected a language model, such as one of task=shakespeare, got one of {got}")
    prompt = prompt or ("\n" if "\n" in alphabet else " ").encode()
    how = {name: getattr(options, name) for name in ("temperature", "top_k", "seed")}
    try:
        symbols = Continuation(model, encode(prompt, alphabet), options.tokens, **how)
    except ValueError as error:
        raise UsageError(str(error)) from None
    status, begun = 0, time.monotonic()  # the prompt has been read
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several bytes
    try:
        sys.stdout.write(decoder.decode(prompt))
        for ids in symbols:
            sys.stdout.write(decoder.decode(decode(ids, alphabet)))
            sys.stdout.flush()
    except KeyboardInterrupt:  # what there is stays
        status = 128 + signal.SIGINT
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()
    rate, size = symbols.made / (time.monotonic() - begun), sum(part.nbytes for part in symbols.state.values())
    sys.stderr.write(f"{symbols.made} symbols made, {rate:,.0f} a second; state {size / 1024:,.0f} KiB\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
