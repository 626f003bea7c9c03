"""The errors that this package raises besides Python's own."""


class CodecError(RuntimeError):
    """A bitstream that is corrupt, cut short or from a newer format, or a codec that failed."""


class CodecUnavailableError(CodecError, ImportError):
    """The codec exists but a package that it needs is missing; the message says which one."""


class StepTooFineError(CodecError):
    """A step is so fine that the encoder cannot write what the tile takes at it."""


class DecoderError(CodecError):
    """A decoder of a device failed, or returned something else than the CPU's: the CPU decodes."""


class RateError(ValueError):
    """A rate or distortion target that this codec cannot reach; names the nearest that it can.

    Attributes:
        nearest: the nearest reachable value, in the unit of the target.
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest
