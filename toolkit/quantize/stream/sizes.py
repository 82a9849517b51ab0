"""How many tokens are looked at: read by what plans a run and by what does it."""

__all__ = ["CHUNK_TOKENS", "HELD_SHARE", "HELD_TOKENS", "TOWER_PATCHES"]

#: Tokens that go through a layer at once, to start with; halved when the device runs out of memory.
CHUNK_TOKENS = 4096
#: Tokens kept out of the search to check it: about this share of all, and about this many at most, in whole samples;
#: one sample is kept out at least, however large its share.
HELD_TOKENS = 4096
HELD_SHARE = 0.1
#: Patches that the vision tower is searched on, at most: fifty a channel of the widest linear, 1.3 GB of a 2B's states.
TOWER_PATCHES = 2**18
