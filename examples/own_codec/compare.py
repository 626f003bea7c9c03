"""The codec of deadzone.py beside the built-in ones, on a weight of all-MiniLM-L6-v2.

pip install examples/own_codec
python examples/own_codec/compare.py
"""

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.evaluation.models import minilm_weights

weight = minilm_weights()["encoder.layer.3.attention.self.query.weight"]
print("codec      asked  bits per weight  SNR")
for bits in (2, 3, 4):
    for codec in ("deadzone", "hevc", "ectcq"):
        coded = CodecTensor.from_hp(weight, codec_weight_only(codec, bits=bits))
        print(f"{codec:10} {bits:5} {coded.bits_per_weight:16.3f} {coded.header.snr_db:5.2f} dB")
