"""The paper ledger: each claim of the paper that we teach, the notebook cell that shows it and the test that holds it.

`claim` is the cell metadata of that name in the notebook; `test` is a pytest node. tests/test_ledger.py fails when
either no longer exists.
"""

from typing import NamedTuple


class Claim(NamedTuple):
    where: str  # equation, section, theorem or table of the paper
    says: str
    notebook: str
    claim: str
    test: str


LEDGER: list[Claim] = []

# ------------------------------------------------------------------------------------------------ 01
LEDGER += [
    Claim(
        "Table 1",
        "MHA caches 2 h d_h numbers per token and layer",
        "01_attention_and_the_kv_cache",
        "table-1-mha-cache",
        "tests/test_memory.py::test_bytes_of_real_caches_and_weights_of_real_layers_are_the_formulas",
    ),
    Claim(
        "Sec. 4",
        "MQA and GQA bound the rank of each token's keys by their number of key heads",
        "01_attention_and_the_kv_cache",
        "sharing-is-low-rank",
        "tests/course/checks/test_checks.py::test_shared_keys_have_low_rank",
    ),
    Claim(
        "Table 1, App. H",
        "numbers cached per token by the five mechanisms at the small size",
        "01_attention_and_the_kv_cache",
        "table-1-cache-small",
        "tests/test_memory.py::test_cached_numbers_of_the_papers_own_configurations",
    ),
]

# ------------------------------------------------------------------------------------------------ 02
LEDGER += [
    Claim(
        "Eq. 3.1",
        "Q_t is the mean of R_Q outer products of contextual factors",
        "02_tensor_product_factorization",
        "eq-3.1",
        "tests/test_tpa.py::test_assemble_is_a_mean_of_outer_products",
    ),
    Claim(
        "Sec. 3.1",
        "contextual factors, unlike LoRA's static ones, bound the rank of each token's matrix, not of their stack",
        "02_tensor_product_factorization",
        "contextual-vs-static",
        "tests/course/checks/test_checks.py::test_two_notions_of_low_rank",
    ),
    Claim(
        "Table 1",
        "the layer has d_model (R_Q+R_K+R_V)(h+d_h) + d_model h d_h parameters",
        "02_tensor_product_factorization",
        "table-1-parameters",
        "tests/test_tpa.py::test_parameters_are_table_1s",
    ),
    Claim(
        "App. G",
        "factor weights start Xavier-uniform; the authors' code takes the fans of a three-dimensional view",
        "02_tensor_product_factorization",
        "app-g-initialization",
        "tests/test_tpa.py::test_initialization_bounds",
    ),
]

# ------------------------------------------------------------------------------------------------ 03
LEDGER += [
    Claim(
        "Sec. 3.2",
        "RoPE multiplies a row vector by T_t, whose angles are t · base^(-2j/d_h)",
        "03_rope_and_prerotation",
        "sec-3.2-rope",
        "tests/test_tpa.py::test_rope_is_the_papers_row_vector_rotation",
    ),
    Claim(
        "Theorem 3.1",
        "rotating B_Q or B_K is rotating the assembled Q or K",
        "03_rope_and_prerotation",
        "theorem-3.1",
        "tests/test_tpa.py::test_rotating_b_is_rotating_the_assembled_matrix",
    ),
    Claim(
        "App. D.1",
        "logits of rotated queries and keys depend on t - s alone",
        "03_rope_and_prerotation",
        "relative-positions",
        "tests/test_tpa.py::test_shifting_all_positions_changes_nothing",
    ),
    Claim(
        "Sec. 3.2",
        "MLA's latent cannot carry RoPE through its up-projection",
        "03_rope_and_prerotation",
        "mla-detour",
        "tests/course/checks/test_checks.py::test_a_latent_carries_rope_only_without_compression",
    ),
]
# ------------------------------------------------------------------------------------------------ 04
LEDGER += [
    Claim(
        "Sec. 4",
        "MHA is TPA of rank h with head factors h · e_i",
        "04_special_cases",
        "sec-4-mha",
        "tests/test_huggingface.py::test_mha_mqa_and_gqa_are_fixed_a_tpa",
    ),
    Claim(
        "Sec. 4",
        "GQA is TPA of rank G with head factors G · mask_j, and MQA the case of rank 1",
        "04_special_cases",
        "sec-4-gqa-mqa",
        "tests/test_huggingface.py::test_mha_mqa_and_gqa_are_fixed_a_tpa",
    ),
    Claim(
        "Sec. 4",
        "the layers agree in outputs and gradients, with RoPE, from the same weights",
        "04_special_cases",
        "sec-4-layers",
        "tests/test_huggingface.py::test_mha_mqa_and_gqa_are_fixed_a_tpa",
    ),
    Claim(
        "Table 1",
        "TPA with non-contextual A caches (R_K + R_V) d_h numbers per token",
        "04_special_cases",
        "table-1-fixed-a",
        "tests/test_variants.py::test_cached_equals_uncached_and_bytes_equal_the_formula",
    ),
]
# ------------------------------------------------------------------------------------------------ 05
LEDGER += [
    Claim(
        "Sec. 3.2, Theorem 3.1",
        "b_k is rotated once, before it is stored; a token's factors do not depend on when they are made",
        "05_factor_cache",
        "prerotated",
        "tests/test_tpa.py::test_the_layer_caches_b_k_as_rotated",
    ),
    Claim(
        "Sec. 3.3, Table 1",
        "the cache holds (R_K + R_V)(h + d_h) numbers per token, measured in bytes",
        "05_factor_cache",
        "cache-size",
        "tests/test_tpa.py::test_cache_bytes_are_the_formulas",
    ),
    Claim(
        "Table 1, App. H",
        "caches of the small models: MHA 1,536 (12 heads), TPA 392, MLA 288, GQA-2 256, MQA 128",
        "05_factor_cache",
        "cache-small-models",
        "tests/test_memory.py::test_cached_numbers_of_the_papers_own_configurations",
    ),
]

# ------------------------------------------------------------------------------------------------ 06
LEDGER += [
    Claim(
        "App. A",
        "logits and outputs from the factors alone, with loops and counted",
        "06_attention_in_factor_space",
        "algorithm-1-loops",
        "tests/test_tpa.py::test_factor_space_attention_equals_loops_over_outer_products",
    ),
    Claim(
        "App. A, Algorithm 1",
        "factor-space attention equals assembled attention",
        "06_attention_in_factor_space",
        "algorithm-1-einsum",
        "tests/test_tpa.py::test_factor_space_attention_equals_assembled_attention",
    ),
    Claim(
        "App. A.4",
        "multiply-adds to decode one token, the three worked layers",
        "06_attention_in_factor_space",
        "appendix-a4",
        "tests/test_memory.py::test_worked_costs_of_app_a4",
    ),
    Claim(
        "App. A, Algorithm 2",
        "block by block with an online softmax, for any ranks, lengths and blocks",
        "06_attention_in_factor_space",
        "algorithm-2",
        "tests/test_tpa.py::test_factor_space_attention_equals_assembled_attention",
    ),
    Claim(
        "Eq. A.4",
        "when factor space needs fewer multiply-adds than MHA",
        "06_attention_in_factor_space",
        "equation-a4",
        "tests/course/checks/test_checks.py::test_wrong_answers_are_told_apart",
    ),
]

# ------------------------------------------------------------------------------------------------ 07
LEDGER += [
    Claim(
        "Table 10",
        "head counts of MHA, MQA, GQA-2, KV-only and TPA follow from 4 d_model² weights per layer",
        "07_t6",
        "table-10",
        "tests/test_memory.py::test_head_matching_gives_app_h",
    ),
    Claim(
        "Table 10",
        "the stated widths of MLA do not fit its head counts at the three larger sizes",
        "07_t6",
        "table-10-mla",
        "tests/test_memory.py::test_the_stated_widths_of_mla_do_not_fit_its_head_counts",
    ),
    Claim(
        "Table 1",
        "weights of real TPA layers are the formula's, and models match MHA's total",
        "07_t6",
        "table-1-parameters",
        "tests/test_tpa.py::test_parameters_are_table_1s",
    ),
    Claim(
        "Sec. 3.3",
        "generation with and without the factor cache gives the same text",
        "07_t6",
        "generate-cached",
        "tests/test_tpa.py::test_generate_with_and_without_a_cache_gives_the_same_tokens",
    ),
]

# ------------------------------------------------------------------------------------------------ 08
LEDGER += [
    Claim(
        "App. H",
        "AdamW decays by 0.1, here on matrices",
        "08_train_on_fineweb_edu",
        "app-h-decay",
        "tests/experiments/test_train.py::test_decay_is_for_matrices_the_tied_embedding_included",
    ),
    Claim(
        "App. H",
        "the learning rate warms up, then follows a cosine",
        "08_train_on_fineweb_edu",
        "app-h-schedule",
        "tests/experiments/test_train.py::test_learning_rate_warms_up_then_follows_a_cosine_to_a_twentieth",
    ),
    Claim(
        "App. H",
        "mechanisms are compared at equal parameters, by their head counts",
        "08_train_on_fineweb_edu",
        "app-h-equal-parameters",
        "tests/experiments/test_train.py::test_every_attention_trains_with_the_parameters_and_the_cache_of_its_formula",
    ),
]
# ------------------------------------------------------------------------------------------------ 09
LEDGER += [
    Claim(
        "Abstract",
        "how much TPA saves depends on the baseline: MHA with as many heads, or what ships",
        "09_memory_savings",
        "ratio-names-its-baseline",
        "tests/test_memory.py::test_the_question_everyone_asks",
    ),
    Claim(
        "Table 1",
        "cached numbers and parameters of MHA, MQA, GQA, MLA and TPA are those of real layers",
        "09_memory_savings",
        "table-1-cache",
        "tests/test_memory.py::test_bytes_of_real_caches_and_weights_of_real_layers_are_the_formulas",
    ),
    Claim(
        "Table 1",
        "a 70B-class GQA model with 128k tokens, and its TPA versions",
        "09_memory_savings",
        "llama-70b-question",
        "tests/test_memory.py::test_the_question_everyone_asks",
    ),
    Claim(
        "Table 1",
        "TPA caches less than G shared heads while R_K + R_V < 2 G d_h / (h + d_h)",
        "09_memory_savings",
        "break-even",
        "tests/test_memory.py::test_break_even",
    ),
    Claim(
        "App. H",
        "at equal parameters MQA, GQA and MLA cache less than TPA at the small size",
        "09_memory_savings",
        "paper-sizes-cache",
        "tests/test_memory.py::test_cached_numbers_of_the_papers_own_configurations",
    ),
    Claim(
        "App. A.4",
        "multiply-adds of decoding one token with MHA, MLA and TPA",
        "09_memory_savings",
        "app-a4-costs",
        "tests/test_memory.py::test_worked_costs_of_app_a4",
    ),
    Claim(
        "Eq. 3.1",
        "each token's key matrix has rank R_K at most; the keys of a text together have not",
        "09_memory_savings",
        "rank-of-keys",
        "tests/test_memory.py::test_keys_have_rank_r_k_per_token_and_more_per_text",
    ),
]
# ------------------------------------------------------------------------------------------------ 10
LEDGER += [
    Claim(
        "App. A, Algorithm 2",
        "splits of the cache attended to apart merge exactly, by rescaling to a common maximum",
        "10_flash_decode",
        "alg-2-splits",
        "tests/course/checks/test_checks.py::test_right_answers_are_accepted_in_every_type",
    ),
    Claim(
        "App. A, Algorithm 2; Sec. 6.2",
        "one pass over the cached factors decodes a token, for any ranks, without building K or V",
        "10_flash_decode",
        "alg-2-kernel",
        "tests/test_flash_decode.py::test_kernel_equals_float64",
    ),
]

# ------------------------------------------------------------------------------------------------ 11
LEDGER += [
    Claim(
        "Table 1, App. G",
        "with non-contextual A the cache holds (R_K+R_V) d_h numbers; the family is not inside contextual TPA",
        "11_variants",
        "table-1-fixed-a",
        "tests/test_variants.py::test_fixed_factors_are_tpa_on_inputs_with_a_constant_coordinate",
    ),
    Claim(
        "Table 1, App. G",
        "with non-contextual B the cache holds (R_K+R_V) h numbers, and RoPE still turns the constants",
        "11_variants",
        "app-g-fixed-b",
        "tests/test_variants.py::test_cached_equals_uncached_and_bytes_equal_the_formula",
    ),
    Claim(
        "App. G",
        "b_k = b_v can be cached once, unrotated: R (2h + d_h) numbers",
        "11_variants",
        "app-g-shared-b",
        "tests/test_variants.py::test_shared_feature_factors_are_tpa_with_equal_key_and_value_rows",
    ),
    Claim(
        "Theorem C.1",
        "in third order, rotating b alone is RoPE by I ⊗ R_t",
        "11_variants",
        "theorem-c1",
        "tests/test_variants.py::test_rotating_b_alone_is_rope_of_the_third_order_product",
    ),
]

# ------------------------------------------------------------------------------------------------ 12
LEDGER += [
    Claim(
        "Sec. 3.2",
        "mirroring half of the features turns the sense of RoPE: LLaMA weights carry over exactly",
        "12_bring_your_own_model",
        "llama-rotation",
        "tests/test_huggingface.py::test_a_llama_gives_the_same_logits",
    ),
    Claim(
        "Sec. 4",
        "contextual factors are even in the input, so MHA, MQA and GQA need constant head factors",
        "12_bring_your_own_model",
        "contextual-is-even",
        "tests/test_huggingface.py::test_contextual_factors_cannot_follow_a_linear_map_of_centred_inputs",
    ),
]

# ------------------------------------------------------------------------------------------------ 13
LEDGER += [
    Claim(
        "Sec. 6",
        "downstream accuracy ranks the answers by their log-likelihood under the model",
        "13_evaluate",
        "likelihood-ranking",
        "tests/experiments/test_evaluate.py::test_log_likelihoods_are_a_plain_loop_over_the_logits",
    ),
    Claim(
        "Sec. 6",
        "the averages over nine tasks show TPA level with MHA and MLA, within their standard errors",
        "13_evaluate",
        "paper-averages",
        "tests/course/checks/test_ex13.py::test_the_statements_by_the_paper_s_numbers",
    ),
]
