# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The door to this checkout: `import moevlm` makes the flat files one package, known to the Auto classes."""

from pathlib import Path

import transformers

__path__ = [str(Path(__file__).resolve().parent)]

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration, MoeVlmModel
from moevlm.processing_moevlm import MoeVlmProcessor

# transformers 5 dropped the old name; its successor takes the same calls.
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)

transformers.AutoConfig.register(MoeVlmConfig.model_type, MoeVlmConfig)
transformers.AutoProcessor.register(MoeVlmConfig, MoeVlmProcessor)
transformers.AutoModel.register(MoeVlmConfig, MoeVlmModel)
for auto in {AutoModelForVision2Seq, transformers.AutoModelForImageTextToText}:
    auto.register(MoeVlmConfig, MoeVlmForConditionalGeneration)
