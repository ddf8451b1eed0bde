"""The digest of one block's bytes: xxh3-64, from the `xxhash` package.

Not cryptographic: it finds bits that were lost or mixed up on the way, not an attacker, who has no
way in (sockets are authenticated). The package has wheels for every platform of ours and hashes
faster than memory is read, so there is nothing to gain from a digest in our own C++.
"""

from xxhash import xxh3_64_intdigest


def block_digest(data: memoryview) -> int:
    return xxh3_64_intdigest(data)
