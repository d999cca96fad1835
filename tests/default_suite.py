"""Which part of the long matrices the default suite runs. The rest is marked ``slow`` and
``matrix``.

A test named here runs for a given number of its parameter sets (0: only with ``-m slow``), or for as many as it takes
to use every value of every parameter once (``COVER``). Other tests run whole; most take less than a second.
"""

from collections import Counter
from collections.abc import Sequence

import pytest

COVER = -1

# By the file's name and the test's.
DEFAULT: dict[str, int] = {
    # attention
    "test_attention::test_equals_the_oracle": COVER,
    "test_decode::test_equals_the_oracle": COVER,
    "test_decode::test_scores_sinks_and_trees": COVER,
    "test_decode::test_splitting_changes_nothing_beyond_rounding": COVER,
    "test_decode::test_with_a_fixed_chunk_a_row_does_not_depend_on_the_others": COVER,
    "test_gradients::test_equals_the_oracle": COVER,
    "test_scores::test_equals_the_oracle": COVER,
    "test_scores::test_the_gradient_of_a_bias_is_summed_over_what_it_is_shared_by": COVER,
    "test_scores::test_several_parameters_of_one_function": 2,
    "test_sinks::test_equals_the_oracle": COVER,
    "test_derivatives::test_gradients_are_those_of_differences": 3,
    "test_derivatives::test_the_reference_has_derivatives_of_every_order_and_mode": 1,
    "test_random_programs::test_random_programs_equal_the_oracle": COVER,
    "test_transformations::test_shards_of_batch_and_heads_are_the_whole": 1,
    "test_paged::test_a_page_that_the_pool_does_not_have_is_empty": COVER,
    "test_paged::test_one_buffer_for_all_sequences": COVER,
    "test_paged::test_pages_in_any_order": COVER,
    "test_paged::test_pages_of_quantised_keys": COVER,
    "test_quantized_attention::test_attends_to_what_they_stand_for": COVER,
    "test_quantized_attention::test_no_copy_of_the_whole_is_made": COVER,
    "test_shapes::test_head_sizes_equal_the_oracle_in_both_passes": COVER,
    "test_shapes::test_head_sizes_lower_for_a_gpu": COVER,
    "test_shapes::test_the_largest_positions": 2,
    "test_vmap::test_equals_a_loop": 3,
    "test_vmap::test_numpy_operands_are_like_others": 1,
    "test_vmap::test_shared_keys_and_values_are_not_copied": 2,
    "test_attention_calls::test_every_way_to_say_the_same_mask": 2,
    "test_attention_calls::test_a_call_outside_jit_takes_numpy_arrays_and_compiles_once": 2,
    "test_block_mask::test_lists_are_tight": 6,
    "test_block_mask::test_positions_and_operands_of_every_shape": COVER,
    "test_wide_numbers::test_masks_of_far_positions": 20,
    "test_flax::test_nnx_gives_the_same": 4,
    "test_flax::test_linen_trains_the_same": 1,
    "test_flax::test_nnx_trains_the_same": 1,
    # functions of users
    "test_custom_functions::test_scores_and_their_gradients": 4,
    "test_custom_functions::test_masks": COVER,
    "test_custom_functions::test_masks_in_the_algebra": 2,
    "test_custom_functions::test_arrays_of_64_bits": 2,
    "test_custom_functions::test_parameters_and_what_is_closed_over_are_alike": 2,
    "test_custom_functions::test_vmap_keeps_the_row_of_an_element": 2,
    "test_custom_functions::test_vmap_of_what_is_closed_over": 1,
    "test_custom_functions::test_a_function_compiles_once_whatever_it_closes_over": COVER,
    "test_pointwise::test_a_score_of_tiles_is_that_of_every_pair": 16,
    "test_triton_lowering::test_lowers_with_what_users_write_as_a_score": 16,
    "test_triton_lowering::test_lowers_with_keys_however_they_are_stored": COVER,
    # kernels
    "test_decode_triton::test_key_weights_come_from_the_same_pass": 3,
    "test_decode_triton::test_key_weights_are_beside_out_and_lse_which_do_not_change": 0,
    "test_decode_triton::test_pages_in_any_order": COVER,
    "test_decode_triton::test_quantised_keys_and_values": COVER,
    "test_decode_triton::test_wide_heads_of_eight_bits_come_in_halves_for_float32": COVER,
    "test_decode_triton::test_rows_of_a_group_share_a_tile": 3,
    "test_gradient_poison::test_poison_in_what_is_not_there_changes_no_bit": COVER,
    "test_key_weights::test_equals_a_loop_over_pairs": COVER,
    "test_key_weights::test_of_quantised_and_paged_keys": COVER,
    "test_large_logits::test_both_passes": COVER,
    "test_large_logits::test_decode_in_chunks": COVER,
    "test_machine_code::test_decode_copies_keys_as_they_are_stored": COVER,
    "test_backward_machine_code::test_default_blocks_do_not_spill": COVER,
    "test_work_follows_lists::test_each_list_is_read_once_and_masks_are_evaluated_for_its_partial_blocks": 4,
    "test_work_follows_lists::test_poison_outside_of_one_list_does_not_reach_its_queries": COVER,
    # 64-bit mode
    "test_x64::test_caches_have_no_wide_number": COVER,
    "test_x64::test_caches_are_the_same": 0,
    "test_x64::test_decode_is_the_same": 0,
    "test_x64::test_both_passes_are_the_same": 1,
    "test_x64::test_kernels_for_cuda_are_the_same": 1,
    "test_x64::test_keys_however_they_are_stored_have_no_wide_number": COVER,
    "test_x64::test_both_passes_have_no_wide_number": COVER,
    "test_models_x64::test_a_generator_gives_the_same": 0,
    "test_models_x64::test_modules_of_flax_give_the_same": 0,
    "test_models_x64::test_the_self_check_of_the_command_line_is_the_same": 0,
    # caches
    "test_cache_gradients::test_attention_through_a_cache_has_the_gradients_of_what_is_kept": 2,
    "test_cache_gradients::test_the_gradient_of_a_token_is_that_of_the_slots_that_show_it": 7,
    "test_cache_gradients::test_a_quantized_cache_has_no_gradient_and_raises": COVER,
    "test_cache_rows::test_some_rows_of_a_cache_equal_all_where_the_others_have_only_padding": 3,
    "test_policies::test_any_program_leaves_what_lists_would_hold": 3,
    "test_storages::test_appending_to_a_donated_cache_copies_none_of_it": COVER,
    "test_storages::test_attending_to_a_cache_copies_none_of_it": COVER,
    "test_storages::test_steps_of_a_layer": 3,
    "test_storages::test_what_is_not_a_number_stays_in_its_slot_until_that_is_used_again": COVER,
    # decoders
    "test_decoder_gradients::test_weights_have_the_gradients_of_a_decoder_without_caches": 1,
    "test_decoder_gradients::test_a_cached_decoder_has_gradients": 0,
    "test_decoder_gradients::test_only_weights_above_a_quantized_cache_have_gradients": 0,
    "test_decoder_gradients::test_a_prefix_that_caches_hold_has_gradients": 0,
    "test_decoder_caches::test_some_rows_of_the_caches_equal_the_whole_batch": 1,
    "test_decoder_caches::test_with_enough_room_every_policy_equals_the_uncached_forward": 1,
    "test_decoder_caches::test_stored_values_do_not_depend_on_policy_or_chunks": 1,
    "test_decoder_caches::test_a_window_cache_of_a_layer_with_a_window_changes_nothing": 1,
    "test_decoder_caches::test_in_bfloat16_the_cache_adds_no_error": 0,
    "test_decoder_caches::test_default_positions_of_some_rows_go_on_where_each_is": 0,
    "test_decoder_caches::test_fewer_bits_are_further_away": 0,
    # generation
    "test_generator_transformers::test_options": 2,
    "test_generator_caches::test_rows_may_be_longer_than_a_bounded_cache": 1,
    "test_generator_caches::test_with_enough_room_tokens_equal_dense": 0,
    "test_generator_caches::test_a_row_does_not_depend_on_other_rows": 0,
    "test_invalid::test_a_nan_row_ends_and_leaves_nothing_behind": 2,
    "test_serving::test_nothing_is_lost_under_load": 1,
    "test_score::test_the_model_without_a_cache": 1,
    "test_guidance::test_a_plain_loop_that_runs_both_prompts": 1,
    "test_samples::test_each_sample_equals_a_request_with_its_seed": 1,
    "test_speculation_caches::test_caches_hold_the_accepted_tokens": 1,
    "test_speculation_caches::test_caches_are_updated_in_place": 1,
    "test_speculation_distribution::test_the_distribution_of_the_output_and_of_the_acceptance": 0,
    "test_speculation_outputs::test_the_output_equals_plain_decoding": 1,
    "test_speculation_outputs::test_a_trained_model_answers_the_same": 0,
    "test_speculation_outputs::test_samples_of_one_prompt_equal_plain_decoding": 1,
    "test_train::test_a_seed_fixes_every_bit": 0,
    "test_decoder_gradients::test_the_choice_of_heavy_hitters_is_a_constant": 0,
    "test_models_readme::test_another_process_finds_the_executables": 0,
    "test_generator_caches::test_requests_wait_for_pages": 0,
    "test_vmap::test_gradients_of_shared_keys_and_values_are_summed": 0,
    "test_checkpoints::test_a_scan_over_layers_with_one_block_mask": 1,
    "test_checkpoints::test_a_checkpoint_policy_keeps_the_output_and_runs_no_forward_pass_again": 1,
    "test_checkpoints::test_checkpoints_change_no_gradient": 1,
    "test_checkpoints::test_gradients_without_jit_are_those_with_it": 1,
    "test_cached_decoder::test_the_state_is_split_merged_and_saved": 1,
    "test_decoder::test_padding_changes_nothing_at_real_tokens": 1,
    "test_decoder::test_chunks_through_caches_equal_one_uncached_call": 1,
    "test_decoder::test_half_precision_stays_near_float32": 1,
    "test_pages::test_leaves_what_rows_of_their_own_would_hold": 2,
    "test_gradients::test_the_same_call_gives_the_same_bits": 1,
    "test_cache_rows::test_attention_over_some_rows": 2,
    "test_cache_rows::test_some_rows_of_a_donated_cache_are_updated_in_place": 3,
    "test_cache_rows::test_copied_rows_are_what_a_fork_makes": 3,
    "test_custom_functions::test_scores_in_decode": 3,
    "test_quantized_attention::test_vmap_is_a_loop": 1,
    # bench
    "test_bench_check::test_right_results_are_correct": COVER,
    "test_bench_peers::test_peers_compute_the_case": COVER,
    "test_bench_run::test_a_wrong_result_has_no_time": 1,
    "test_bench_semantics::test_like_flax": 3,
    "test_static::test_decode_copies_what_is_stored": 2,
    "test_bench_run::test_gpu_tests_are_run": 1,
    "test_bench_run::test_a_case_that_breaks_does_not_stop_the_others": 0,
    "test_bench_run::test_peaks_are_measured_in_the_same_run": 0,
    "test_bench_training::test_both_learn_the_same": 0,
}


def left_out(items: Sequence[pytest.Function]) -> list[pytest.Function]:
    """The collected tests that only ``-m slow`` runs."""
    matrices: dict[str, list[pytest.Function]] = {}
    for item in items:
        # What this machine would skip is no part of the choice.
        if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            matrices.setdefault(f"{item.path.stem}::{item.originalname}", []).append(item)
    return [item for name, matrix in matrices.items() if name in DEFAULT for item in _left_out(matrix, DEFAULT[name])]


def _left_out(matrix: list[pytest.Function], wanted: int) -> list[pytest.Function]:
    """All but a choice that uses the values of every parameter about equally often."""
    if wanted == 0:
        return matrix
    values = [{(name, _known(value)) for name, value in item.callspec.params.items()} for item in matrix]
    uses: Counter = Counter()
    chosen: list[int] = []
    all_values = set().union(*values)
    while len(chosen) < len(matrix) and (len(chosen) < wanted or (wanted == COVER and uses.keys() < all_values)):
        rest = [n for n in range(len(matrix)) if n not in chosen]
        best = min(rest, key=lambda n: (-len(values[n] - uses.keys()), sum(uses[x] for x in values[n]), n))
        chosen.append(best)
        uses.update(values[best])
    return [item for n, item in enumerate(matrix) if n not in chosen]


def _known(value: object) -> object:
    """A key to compare a parameter by; an unhashable one equals only itself."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
