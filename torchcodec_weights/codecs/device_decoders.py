"""Sets the decoders of pictures on CUDA devices (`SampleCodec.device_decoder`).

Not in the modules of the codecs nor in the table of codecs, which processes import without PyTorch:
those that only decode on the CPU, and those that only list what files hold.
"""

from torchcodec_weights.codecs.image import nvimage
from torchcodec_weights.codecs.image.jpeg2000 import HTJ2K, JPEG2000
from torchcodec_weights.codecs.video import nvdec
from torchcodec_weights.codecs.video.av1 import AV1
from torchcodec_weights.codecs.video.vp9 import VP9
from torchcodec_weights.codecs.video.x26x import H264, HEVC

for _video in (HEVC, H264, AV1, VP9):
    _video.device_decoder = nvdec.DECODER
# jpeg has none: its standard leaves rounding to the decoder, and nvJPEG's samples may be others.
for _image in (JPEG2000, HTJ2K):
    _image.device_decoder = nvimage.DECODER
