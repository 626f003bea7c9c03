"""The exceptions of this package."""


class CodecError(RuntimeError):
    """A bitstream is corrupt, cut short or from a newer format, or a codec failed."""


class CodecUnavailableError(CodecError, ImportError):
    """The codec exists but a package that it needs is missing; the message says which one."""


class StepTooFineError(CodecError):
    """A step is so fine that the encoder cannot write what the tile takes at it."""


class DecoderError(CodecError):
    """A device's decoder failed, or its result differs from the CPU's. The CPU decodes instead."""


class RateError(ValueError):
    """A target that the codec cannot reach for this matrix; names the nearest that it can reach.

    Attributes:
        nearest: the nearest reachable value, in the unit of the target.
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest
