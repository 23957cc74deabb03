"""placeholder while being written"""


class EmbeddedEngine: ...
