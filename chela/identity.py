from chela.config.identity import fingerprint, identity_of, own_code  # noqa: F401
from chela.config.schema import fields  # noqa: F401


def identities(config, saved=None):  # type: ignore[no-untyped-def]
    return (fingerprint(config),)
