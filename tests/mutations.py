"""Mutation tests: break the code in one place at a time and check that a test fails.

    python tests/mutations.py [WORD ...]

Each mutation replaces one piece of text in a copy of `src` and runs one test on the copy. If the
test still passes, the mutation survives: a test is missing, and the exit code is 1. With WORDs,
only the mutations whose entry contains all of them run.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    description: str
    file: str  # in src/simsiam
    old: str  # occurs exactly once in the file
    new: str
    test: str  # in tests/, as pytest names it


def m(description: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(description, f"{file}.py", old, new, f"test_{test}")


GRADIENT_TEST = "rows.py::test_a_gradient_comes_through_the_target_only_when_asked"
MUTATIONS = [
    # the method
    m(
        "remove the stop-gradient",
        "model/siamese",
        "t[j].detach()",
        "t[j]",
        "method.py::test_simsiam_is_algorithm_1",
    ),
    m(
        "stop it where it should flow",
        "model/siamese",
        "if self.method.stop_gradient:",
        "if True:",
        "method.py::test_stop_gradient_halves_the_gradient_where_there_is_no_predictor",
    ),
    m(
        "always stop the gradient",
        "model/siamese",
        "if self.method.stop_gradient:",
        "if True:",
        f"{GRADIENT_TEST}[simclr]",
    ),
    m(
        "swap the target",
        "model/siamese",
        "self.criterion(p[i], t[j])",
        "self.criterion(p[i], t[i])",
        "method.py::test_simsiam_is_algorithm_1",
    ),
    m(
        "swap the arguments of D",
        "model/siamese",
        "self.criterion(p[i], t[j])",
        "self.criterion(t[j], p[i])",
        f"{GRADIENT_TEST}[simclr]",
    ),
    m(
        "sum instead of the mean",
        "model/siamese",
        "for i, j in self.pairs]).mean()",
        "for i, j in self.pairs]).sum()",
        "method.py::test_simsiam_is_algorithm_1",
    ),
    m(
        "forget the loss scale",
        "model/siamese",
        "self.method.loss_scale * loss,",
        "loss,",
        f"{GRADIENT_TEST}[byol]",
    ),
    m(
        "let codes' gradient reach the prototypes",
        "model/siamese",
        "t = {j: t[j].detach() for j in t}",
        "t = {j: self.criterion.encode_target(eta[j].detach()) for j in t}",
        f"{GRADIENT_TEST}[swav]",
    ),
    m(
        "predict from h's input",
        "model/siamese",
        "self.forward_views(self.predictor, {i: z[i]",
        "self.forward_views(nn.Identity(), {i: z[i]",
        "method.py::test_simsiam_is_algorithm_1",
    ),
    m(
        "leave the criterion's state",
        "model/siamese",
        "self.criterion.after_step(output.targets)",
        "pass",
        "rows.py::test_queued_keys_are_the_second_views_and_in_the_plus_both",
    ),
    m(
        "encode what is not predicted",
        "model/siamese",
        "views = sorted({*self.predicted_views, *self.target.required_views})",
        "views = range(len(x))",
        "rows.py::test_no_row_wastes_encoder_passes[moco_v2-2]",
    ),
    m(
        "share statistics",
        "model/heads",
        '"per_view": forward_per_view',
        '"per_view": forward_joint',
        "method.py::test_batch_norm_statistics_are_each_views_own",
    ),
    m(
        "do not share them",
        "model/heads",
        '"joint": forward_joint',
        '"joint": forward_per_view',
        "rows.py::test_joint_statistics_are_of_all_views_in_one_call",
    ),
    m(
        "do not split them",
        "model/heads",
        '"split": forward_split',
        '"split": forward_per_view',
        "targets.py::test_split_statistics_are_an_eighths_and_the_copys_company_differs",
    ),
    # D
    m(
        "turn the cosine round",
        "model/losses",
        "return -F.cosine_similarity",
        "return F.cosine_similarity",
        "method.py::test_simsiam_is_algorithm_1",
    ),
    m(
        "swap softmax and log softmax",
        "model/losses",
        "(t.softmax(1) * p.log_softmax(1))",
        "(p.softmax(1) * t.log_softmax(1))",
        "criteria.py::test_cross_entropy_is_section_4_5",
    ),
    m(
        "softmax over the batch",
        "model/losses",
        "t.softmax(1) * p",
        "t.softmax(0) * p",
        "criteria.py::test_cross_entropy_is_section_4_5",
    ),
    m(
        "halve NT-Xent's temperature",
        "model/losses",
        "similarities / tau",
        "similarities / (tau / 2)",
        "criteria.py::test_directed_nt_xent_averages_to_the_full_loss",
    ),
    m(
        "let an image be its own negative",
        "model/losses",
        ".masked_fill(same_image, -math.inf)",
        "",
        "criteria.py::test_directed_nt_xent_averages_to_the_full_loss",
    ),
    m(
        "negatives of the same view from t",
        "model/losses",
        "p @ predictions.T",
        "p @ targets.T",
        "criteria.py::test_with_a_predictor_the_negatives_of_the_same_view_are_predictions",
    ),
    m(
        "halve InfoNCE's temperature",
        "model/losses",
        "p @ queue.T], dim=1) / tau",
        "p @ queue.T], dim=1) * 2 / tau",
        "criteria.py::test_info_nce_is_the_cross_entropy_of_the_positive_against_the_queue",
    ),
    m(
        "queue the newest first",
        "model/losses",
        "torch.cat([self.queue, new])[-len(self.queue) :]",
        "torch.cat([new, self.queue])[: len(self.queue)]",
        "criteria.py::test_the_queue_holds_the_latest_targets_in_order[3]",
    ),
    m(
        "queue in forward",
        "model/losses",
        "return info_nce(p, t, self.queue",
        "return self.after_step([t]) or info_nce(p, t, self.queue",
        "criteria.py::test_the_queue_moves_after_the_step_and_not_before",
    ),
    m(
        "do not balance the codes",
        "model/losses",
        "log = log - log.logsumexp(0)",
        "pass",
        "criteria.py::test_sinkhorn_codes_are_balanced",
    ),
    m(
        "sharpen the codes",
        "model/losses",
        "gather(scores) / epsilon",
        "gather(scores) / (epsilon / 2)",
        "criteria.py::test_sinkhorn_codes_are_the_optimal_transport",
    ),
    m(
        "no gradient through Sinkhorn",
        "model/losses",
        "return sinkhorn(self.prototype_scores(t)",
        "return sinkhorn(self.prototype_scores(t).detach()",
        "criteria.py::test_gradcheck[swapped]",
    ),
    m(
        "never renormalize prototypes",
        "model/losses",
        'prototype_norm == "outside"',
        'prototype_norm == "never"',
        "criteria.py::test_prototypes_are_normalized_inside_or_outside_the_gradient",
    ),
    m(
        "prototypes of any length",
        "model/losses",
        'prototype_norm == "inside"',
        'prototype_norm == "never"',
        "criteria.py::test_prototypes_are_normalized_inside_or_outside_the_gradient",
    ),
    m(
        "correlations about zero",
        "model/losses",
        "F.normalize(x - x.mean(0), dim=0)",
        "F.normalize(x, dim=0)",
        "criteria.py::test_barlow_twins_is_invariant_to_affine_maps_of_each_channel",
    ),
    m(
        "covariances for correlations",
        "model/losses",
        "(F.normalize(x - x.mean(0), dim=0) for",
        "((x - x.mean(0)) / len(x) ** 0.5 for",
        "criteria.py::test_barlow_twins_is_invariant_to_affine_maps_of_each_channel",
    ),
    m(
        "weigh the diagonal too",
        "model/losses",
        "weight * (c.square().sum() - on.square().sum())",
        "weight * c.square().sum()",
        "criteria.py::test_barlow_twins_is_equations_1_and_2",
    ),
    m(
        "divide by n",
        "model/losses",
        "x.T @ x / (len(x) - 1)",
        "x.T @ x / len(x)",
        "criteria.py::test_vicreg_is_its_algorithm_1",
    ),
    m(
        "hinge at 2",
        "model/losses",
        "F.relu(1 - (on",
        "F.relu(2 - (on",
        "criteria.py::test_vicreg_is_its_algorithm_1",
    ),
    m(
        "variance of p alone",
        "model/losses",
        "    for x in (p, t):\n        x = x - x.mean(0)\n",
        "    for x in (p,):\n        x = x - x.mean(0)\n",
        "criteria.py::test_vicreg_is_its_algorithm_1",
    ),
    m(
        "lose precision",
        "model/precision",
        "x.element_size() >= 4 else x.float()",
        "True else x.float()",
        "criteria.py::test_half_precision_stays_outside[cosine]",
    ),
    m(
        "stay in autocast",
        "model/precision",
        "with torch.autocast(tensors[0].device.type, enabled=False):",
        "if True:",
        "criteria.py::test_half_precision_stays_outside[nt_xent]",
    ),
    # several processes
    m(
        "gather without gradient",
        "distributed/collectives",
        "return total[ctx.rows], None",
        "return total[ctx.rows] * 0, None",
        "processes.py::test_several_processes_compute_what_one_does[barlow_twins]",
    ),
    m(
        "each process's own gradient alone",
        "distributed/collectives",
        "        distributed.all_reduce(total)\n",
        "",
        "processes.py::test_several_processes_compute_what_one_does[simclr]",
    ),
    m(
        "take the first process's rows",
        "distributed/collectives",
        "start = sum(all_gather_sizes(n)[: rank()])",
        "start = 0",
        "processes.py::test_several_processes_compute_what_one_does[swav]",
    ),
    m(
        "queue process by process",
        "model/losses",
        "torch.cat([all_gather(F.normalize(at_least_float32(view), dim=1)) for view in t])",
        "all_gather(F.normalize(at_least_float32(torch.cat(t)), dim=1))",
        "processes.py::test_several_processes_compute_what_one_does[moco_v2_plus]",
    ),
    m(
        "eta of the own images alone",
        "distributed/collectives",
        "indices, values = all_gather(index), all_gather(values)",
        "indices = index",
        "processes.py::test_several_processes_compute_what_one_does[moving_average]",
    ),
    m(
        "eta of another's images",
        "distributed/collectives",
        "rows = local_table.new_zeros(len(indices), *local_table.shape[1:])\n",
        "rows = local_table.new_ones(len(indices), *local_table.shape[1:])\n",
        "processes.py::test_several_processes_compute_what_one_does[moving_average]",
    ),
    m(
        "eta collected process by process",
        "distributed/collectives",
        "torch.stack(parts, dim=1)",
        "torch.stack(parts, dim=0)",
        "processes.py::test_several_processes_compute_what_one_does[moving_average]",
    ),
    m(
        "the first process's eta for all",
        "distributed/collectives",
        "return table[rank() :: world_size()]",
        "return table[:: world_size()]",
        "processes.py::test_several_processes_compute_what_one_does[moving_average]",
    ),
    m(
        "statistics of equal weight",
        "distributed/sync_batch_norm",
        "counts / n",
        "torch.ones_like(counts) / len(counts)",
        "processes.py::test_several_processes_compute_what_one_does[simsiam]",
    ),
    m(
        "forget how far the means lie apart",
        "distributed/sync_batch_norm",
        "variances + (means - mean).square()",
        "variances",
        "processes.py::test_several_processes_compute_what_one_does[simsiam]",
    ),
    m(
        "batch norm's gradient from the own images",
        "distributed/sync_batch_norm",
        "all_gather_stats(torch.cat([sum_gx, sum_g], dim=1)).sum(0)",
        "world_size() * torch.cat([sum_gx, sum_g], dim=1)",
        "processes.py::test_several_processes_compute_what_one_does[simsiam]",
    ),
    m(
        "one batch of all views",
        "model/heads",
        "separate_views(network, len(views))",
        "separate_views(network, 1)",
        "processes.py::test_several_processes_compute_what_one_does[simsiam]",
    ),
    m(
        "biased running variance",
        "distributed/sync_batch_norm",
        "var * (n / (n - 1))",
        "var",
        "processes.py::test_several_processes_compute_what_one_does[simsiam]",
    ),
    m(
        "keys dealt within a process",
        "model/targets",
        "gathered = {j: all_gather(view) for j, view in views.items()}",
        "gathered, rows = views, slice(None)",
        "processes.py::test_several_processes_compute_what_one_does[split]",
    ),
    m(
        "the same views in every process",
        "data/batches",
        "np.arange(first_position, first_position + len(pixels))",
        "np.arange(len(pixels))",
        "processes.py::test_the_shares_of_a_batch_are_the_batch[resident]",
    ),
    m(
        "the same crops in every process",
        "data/batches",
        "np.arange(first_position, first_position + len(sizes))",
        "np.arange(len(sizes))",
        "processes.py::test_the_shares_of_a_batch_are_the_batch[streamed]",
    ),
    m(
        "go on with another recipe's run",
        "runs/run_folder",
        'if read_recipe(path / "recipe.yaml").resolve() == recipe:',
        "if True:",
        "processes.py::test_under_torchrun_a_run_of_the_same_recipe_is_gone_on_with",
    ),
    # eta
    m(
        "swap momentum's shares",
        "model/targets",
        "copied.lerp_(new, 1 - m)",
        "copied.lerp_(new, m)",
        "targets.py::test_momentum_is_an_exponential_average_in_training_mode",
    ),
    m(
        "a copy of the wrong view",
        "model/targets",
        "{j: x[j] for j in self.views}",
        "{j: x[1 - j] for j in self.views}",
        "targets.py::test_neutral_targets_are_simsiam_bit_for_bit",
    ),
    m(
        "a copy that never moves",
        "model/targets",
        "if (m := self.momentum_at(step)) < 1:",
        "if (m := self.momentum_at(step)) < 0:",
        "targets.py::test_neutral_targets_are_simsiam_bit_for_bit",
    ),
    m(
        "forget the pair's own view",
        "model/targets",
        "for view in (j, *self.extra_views)",
        "for view in (0, *self.extra_views)",
        "targets.py::test_neutral_targets_are_simsiam_bit_for_bit",
    ),
    m(
        "a copy in evaluation mode",
        "model/targets",
        "self.copy = deepcopy(f).requires_grad_(False)",
        "self.copy = deepcopy(f).requires_grad_(False).eval()",
        "targets.py::test_momentum_is_an_exponential_average_in_training_mode",
    ),
    m(
        "a copy that is trained",
        "model/targets",
        "deepcopy(f).requires_grad_(False)",
        "deepcopy(f)",
        f"{GRADIENT_TEST}[byol]",
    ),
    m(
        "a copy of the untouched weights",
        "model/targets",
        "self.copy.load_state_dict(f.state_dict())",
        "pass",
        "targets.py::test_a_copy_starts_from_the_weights_at_the_start_of_the_run",
    ),
    m(
        "blocks one step late",
        "model/targets",
        "(step + 1) % block == 0",
        "step % block == 0",
        "targets.py::test_alternation_equals_targets_cached_ahead",
    ),
    m(
        "momentum that falls",
        "model/targets",
        "return 1 - (1 - method.decay) * ",
        "return method.decay * ",
        "targets.py::test_byols_momentum_rises_to_one_on_a_cosine",
    ),
    m(
        "keys in their queries' company",
        "model/targets",
        "(images % BN_SPLITS).argsort(stable=True)",
        "(images * 0).argsort(stable=True)",
        "targets.py::test_split_statistics_are_an_eighths_and_the_copys_company_differs",
    ),
    m(
        "minimize, then update eta",
        "model/targets",
        "m * eta + (1 - m) * F.normalize(at_least_float32(z[j]), dim=1)",
        "eta + 0 * z[j]",
        "targets.py::test_moving_average_is_updated_and_then_minimized",
    ),
    m(
        "swap eta's shares",
        "model/targets",
        "m * eta + (1 - m) * F",
        "(1 - m) * eta + m * F",
        "targets.py::test_moving_average_without_memory_is_simsiam_without_a_predictor",
    ),
    m(
        "keep one view of the pair",
        "model/targets",
        "torch.stack(t).mean(0), index",
        "t[0], index",
        "targets.py::test_moving_average_is_updated_and_then_minimized",
    ),
    m(
        "eta of any length",
        "model/targets",
        "write_rows(self.eta, index, F.normalize(at_least_float32(z), dim=1))",
        "write_rows(self.eta, index, at_least_float32(z))",
        "targets.py::test_moving_average_is_updated_and_then_minimized",
    ),
    m(
        "mean over too few views",
        "model/targets",
        "for view in (j, *self.extra_views)",
        "for view in self.extra_views or (j,)",
        "targets.py::test_expectation_is_the_minimizer_of_etas_problem",
    ),
    m(
        "labels of other images",
        "model/targets",
        "self.labels[index])",
        "self.labels[: len(index)])",
        "targets.py::test_labels_are_targets",
    ),
    m(
        "groups by their smallest",
        "monitoring/nearest_neighbors",
        ".amax(1)",
        ".amin(1)",
        "knn.py::test_votes_equal_brute_force",
    ),
    m(
        "forget the columns outside the groups",
        "monitoring/nearest_neighbors",
        ".flatten(1), left_over], dim=1)",
        ".flatten(1)], dim=1)",
        "knn.py::test_votes_equal_brute_force",
    ),
    # optimization, terms, batches
    m(
        "adapt by the gradient alone",
        "model/optimizers",
        "norm, target_norm = update.norm()",
        "norm, target_norm = w.grad.norm()",
        "optim.py::test_lars_is_the_formula_of_its_authors[True]",
    ),
    m(
        "adapt all groups",
        "model/optimizers",
        'if group["adapt"]:',
        "if True:",
        "optim.py::test_lars_is_the_formula_of_its_authors[False]",
    ),
    m(
        "exclude nothing",
        "model/optimizers",
        'method.exclude == "bias_and_norm" and p.ndim == 1',
        'method.exclude == "bias_and_norm" and p.ndim == 0',
        "optim.py::test_biases_and_norms_are_excluded_where_the_row_says_so",
    ),
    m(
        "never let prototypes rest",
        "model/optimizers",
        'step >= group.get("rest", 0)',
        "True",
        "optim.py::test_prototypes_rest_and_then_move",
    ),
    m(
        "let momentum wait at lr 0",
        "model/optimizers",
        'for group in (group for group in self.param_groups if group["lr"]):',
        "for group in self.param_groups:",
        "optim.py::test_prototypes_rest_and_then_move",
    ),
    m(
        "own views on equal terms",
        "config/recipes",
        "for cell in EQUAL_TERMS}",
        "for cell in EQUAL_TERMS[1:]}",
        "rows.py::test_equal_terms_are_those_of_the_recipe_at_hand",
    ),
    m(
        "built-in targets alone may use settings",
        "config/method",
        "if value in (*BUILTIN_TARGETS, *BUILTIN_CRITERIA) and value not in values:",
        "if value not in values:",
        "public_api.py::test_a_target_and_a_criterion_from_outside_train_and_are_read_back",
    ),
    m(
        "views in half precision under autocast",
        "data/views",
        "return torch.autocast(device_type, enabled=False)",
        "return nullcontext()",
        "public_api.py::test_views_are_the_same_inside_of_autocast",
    ),
    m(
        "a flag without help",
        "commands/arguments",
        """{"help": _help(f), "default": argparse.SUPPRESS}""",
        """{"help": "", "default": argparse.SUPPRESS}""",
        "commands.py::test_every_argument_of_every_verb_has_help[pretrain]",
    ),
    m(
        "a sweep that leaves images out",
        "data/batches",
        "count - size) + positions",
        "count - 2 * size) + positions",
        "batches.py::test_a_sweep_sees_every_image_in_order",
    ),
    # shards
    m(
        "an order that skips places",
        "data/batches",
        "positions * per_epoch + step)",
        "positions * (per_epoch - 1) + step)",
        "shards.py::test_each_image_is_seen_once_an_epoch[tar]",
    ),
    m(
        "blocks in the order of storage",
        "data/batches",
        'np.argsort(rng.random(len(blocks)), kind="stable")',
        "np.arange(len(blocks))",
        "shards.py::test_interleaving_is_a_permutation_of_blocks_and_within_them",
    ),
    m(
        "neighbors stay neighbors",
        "data/batches",
        "first + int(order_within_block(seed, epoch, block, after - first)[inside])",
        "first + inside",
        "shards.py::test_interleaving_is_a_permutation_of_blocks_and_within_them",
    ),
    m(
        "the same blocks every epoch",
        "data/batches",
        "counter=[0, epoch, 1, 0]",
        "counter=[0, 0, 1, 0]",
        "shards.py::test_interleaving_is_a_permutation_of_blocks_and_within_them",
    ),
    m(
        "one place for a worker's whole part",
        "data/batches",
        "step, view_count, part_slice.start, current\n",
        "step, view_count, 0, current\n",
        "shards.py::test_a_step_is_the_same_whatever_ran_before_and_whoever_makes_it[tar]",
    ),
    m(
        "blocks that are read again",
        "data/shards",
        "if block not in self.loaded_blocks]",
        "if True]",
        "shards.py::test_each_block_is_read_about_once_an_epoch[1]",
    ),
    m(
        "blocks that are never let go",
        "data/shards",
        "for b in wanted.tolist()}",
        "for b in wanted.tolist()} | dict(self.loaded_blocks)",
        "shards.py::test_each_block_is_read_about_once_an_epoch[1]",
    ),
    m(
        "trust a cut shard",
        "data/shards",
        "        if len(data) != size:\n",
        "        if False:\n",
        "shards.py::test_a_shard_cut_after_it_was_cataloged_costs_the_images_behind_the_cut",
    ),
    m(
        "believe any catalog",
        "sources/catalog",
        "if not (inside.all() and",
        "if not (",
        "shards.py::test_a_lying_catalog_is_not_believed",
    ),
    m(
        "let names lead outside",
        "sources/catalog",
        'if parts and b".." not in parts else None',
        "if parts else None",
        "shards.py::test_what_a_tar_may_not_hold_is_ignored_in_one_line",
    ),
    m(
        "follow links",
        "sources/catalog",
        "if not info.isfile() or",
        "if info.isdir() or",
        "shards.py::test_what_a_tar_may_not_hold_is_ignored_in_one_line",
    ),
    m(
        "write all shards again",
        "sources/write_shards",
        "if not (shard.path.exists() and",
        "if not (False and",
        "shards.py::test_killed_and_started_anew_it_is_the_same_folder",
    ),
    m(
        "lose what was lost",
        "training/prepare",
        "[*source.damage, *unreadable]",
        "[*unreadable]",
        "shards.py::test_a_truncated_shard_is_one_line_that_says_what_is_lost[0.5]",
    ),
    m(
        "unpack anything",
        "data/shards",
        "if size > limit:",
        "if False:",
        "shards.py::test_parquet_that_unpacks_to_gigabytes_is_refused_or_read_a_block_at_a_time",
    ),
    m(
        "find splits without a word about the rest",
        "sources/splits",
        "if not len(rows):\n        return []",
        "if True:\n        return []",
        "splits.py::test_images_outside_of_the_splits_are_counted_and_their_folders_named[folder]",
    ),
    m(
        "a split only by the first word",
        "sources/splits",
        're.findall("[a-z]+", name)',
        're.findall("^[a-z]+", name)',
        "splits.py::test_a_word_anywhere_in_the_name_of_a_shard_is_its_split",
    ),
    m(
        "forget the splits of a run",
        "runs/compose",
        "splits = no_labels or recipe.no_labels, splits or recipe.splits",
        "splits = no_labels or recipe.no_labels, splits",
        "splits.py::test_a_run_keeps_its_splits",
    ),
    m(
        "no reason why no image can be read",
        "errors",
        "the first, {printable(name)}: {reason}",
        "the first",
        "cli.py::test_where_no_image_can_be_read_the_first_and_the_reason_are_named[list-pretrain]",
    ),
    m(
        "read UTF-16 as UTF-8",
        "utils/names",
        "data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))",
        "False",
        "sources.py::test_a_list_may_be_in_utf16_or_have_spaces_before_its_labels",
    ),
    m(
        "the first column of images",
        "sources/catalog",
        '(kinds.get(f.name) != "Image", _rank(f.name, IMAGE_NAMES))',
        'kinds.get(f.name) != "Image"',
        "sources.py::test_masks_before_images_are_passed_over_and_named[True]",
    ),
    m(
        "one tar is no shard",
        "sources/catalog",
        "if scan.images and scan.metadata:",
        "if False:",
        "shards.py::test_one_tar_in_the_layout_of_webdataset_is_the_folder_of_this_tar",
    ),
    m(
        "write names as a terminal shows them",
        "embeddings/embed",
        '"path": pa.array([utf8_name(images.keys[i])',
        '"path": pa.array([printable(images.keys[i])',
        "names.py::test_an_embedding_holds_the_names_that_open_the_files",
    ),
    m(
        "let a name control the terminal",
        "embeddings/neighbors",
        'printable(f"{x.cosine:6.3f}',
        'str(f"{x.cosine:6.3f}',
        "names.py::test_terminals_and_pages_show_control_characters_escaped",
    ),
    m(
        "only the exact spelling",
        "embeddings/table",
        "return exact or self",
        "return exact or [] and self",
        "names.py::test_a_name_is_found_as_a_user_types_it",
    ),
    m(
        "a copy of each equal image",
        "sources/open_source",
        '{"metadata": parquet.metadata, "read_dictionary": [image]}',
        '{"metadata": parquet.metadata}',
        "shards.py::test_parquet_that_unpacks_to_gigabytes_is_refused_or_read_a_block_at_a_time",
    ),
    # faults
    m(
        "trust a checkpoint's bytes",
        "runs/weight_files",
        "if record := archive.testzip():",
        "if record := None:",
        "faults.py::test_every_flipped_bit_is_seen_or_harmless",
    ),
    m(
        "trust the weights' bytes",
        "runs/weight_files",
        "metadata[CHECKSUM_KEY] != tensors_sha256(tensors)",
        "metadata[CHECKSUM_KEY] == 0",
        "faults.py::test_weights_carry_their_checksum",
    ),
    m(
        "keep no checkpoint before the last",
        "runs/run_folder",
        'path.with_name("previous.pt") if name == "last" else None',
        "None",
        "faults.py::test_a_damaged_checkpoint_gives_way_to_the_one_before_and_it_is_said[bit]",
    ),
    m(
        "write into the file itself",
        "utils/files",
        "        yield part\n        with open(part",
        "        yield path\n        os.link(path, part)\n        with open(part",
        "faults.py::test_a_file_that_cannot_be_written_leaves_what_was_there",
    ),
    m(
        "clear what living processes write",
        "utils/files",
        "pid.isdigit() and not _process_exists(int(pid))",
        "pid.isdigit()",
        "faults.py::test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not",
    ),
    m(
        "let a second process in",
        "utils/files",
        "                yield False\n",
        "                yield True\n",
        "faults.py::test_of_two_processes_the_second_is_refused_and_a_killed_one_lets_go",
    ),
    m(
        "a signal while forking",
        "utils/workers",
        "    with block_stop_signals():\n",
        "    if True:\n",
        "faults.py::test_a_signal_in_the_middle_of_a_fork_is_not_lost",
    ),
    m(
        "write through a link",
        "runs/run_folder",
        "if entry.is_symlink():",
        "if False:",
        "faults.py::test_a_run_writes_through_no_link",
    ),
    m(
        "quarantine without end",
        "runs/run_folder",
        "if images_seen and len(new) >",
        "if False and len(new) >",
        "pretrain.py::test_more_broken_files_than_allowed_stop_the_run",
    ),
    m(
        "name no file of a hanging worker",
        "data/batches",
        "                current_image.fill_(at % len(images))\n",
        "                pass\n",
        "faults.py::test_a_worker_that_hangs_is_named_with_its_file",
    ),
    m(
        "forget the momentum",
        "training/plan",
        '"optimizer": _total_bytes(state)',
        '"optimizer": 0',
        "plan.py::test_a_run_takes_what_was_planned[simsiam]",
    ),
    m(
        "count what is saved twice",
        "model/memory",
        "saved[storage._cdata] = tensor",
        "saved[len(saved)] = tensor",
        "plan.py::test_activations_are_what_autograd_keeps",
    ),
    # what it is used for
    m(
        "compute all parts again",
        "embeddings/embed",
        "if is_intact(part):",
        "if False:",
        "embeddings.py::test_killed_and_started_again_it_is_the_same_file",
    ),
    m(
        "count a row as its own neighbor",
        "embeddings/search",
        "index == torch.arange(len(x))[:, None]",
        "index < 0",
        "embeddings.py::test_neighbors_are_the_nearest_rows_and_never_the_row_itself",
    ),
    # search, and --no-labels
    m(
        "keep the features of a file that has changed",
        "embeddings/kept_embedding",
        'for name in ("bytes", "mtime"):',
        'for name in ("bytes",):',
        "search.py::test_after_a_change_only_new_images_are_embedded_and_answers_are_fresh",
    ),
    m(
        "append new images, wherever they are in the source",
        "embeddings/kept_embedding",
        "table.take(pa.array(order))",
        "table",
        "search.py::test_after_a_change_only_new_images_are_embedded_and_answers_are_fresh",
    ),
    m(
        "never learn again",
        "embeddings/kept_embedding",
        "elif new < relearn * len(images):",
        "elif True:",
        "search.py::test_it_is_learned_again_once_a_tenth_of_the_images_is_new",
    ),
    m(
        "take the embedding of another encoder",
        "embeddings/kept_embedding",
        "_describe_encoder(encoder.run) if encoder.run else encoder.name",
        "encoder.name",
        "search.py::test_a_head_makes_it_another_encoder",
    ),
    m(
        "confuse images with one name",
        "embeddings/kept_embedding",
        "if not repeats.any():",
        "if True:",
        "search.py::test_images_of_one_name_in_two_shards_keep_their_own_features",
    ),
    m(
        "search while another process embeds",
        "embeddings/kept_embedding",
        "file_lock(path, wait=True)",
        "file_lock(path)",
        "search.py::test_of_two_searches_at_once_the_second_waits_and_embeds_nothing",
    ),
    m(
        "lose what an interrupted search has embedded",
        "embeddings/kept_embedding",
        "(path, *parts)",
        "(path,)",
        "search.py::test_what_an_interrupted_search_has_embedded_is_kept",
    ),
    m(
        "keep the labels",
        "sources/open_source",
        "images.drop_labels() for name",
        "images for name",
        "no_labels.py::test_every_split_loses_its_labels_and_nothing_else",
    ),
    m(
        "resume with labels",
        "runs/compose",
        "no_labels or recipe.no_labels",
        "no_labels",
        "no_labels.py::test_resume_keeps_it",
    ),
    m(
        "take the first images",
        "embeddings/embed",
        "np.searchsorted(evenly_spaced(int(bounds[-1]), limit), bounds)",
        "bounds.clip(0, limit)",
        "embeddings.py::test_a_limit_takes_evenly_spaced_images_of_every_split_and_class",
    ),
    m(
        "ignore differences in color",
        "embeddings/copies/distance",
        "(F.adaptive_avg_pool2d(x[:-1],",
        "(F.adaptive_avg_pool2d(x[-1:],",
        "duplicates.py::test_a_picture_in_another_color_is_no_copy",
    ),
    m(
        "ignore differences in the alpha channel",
        "embeddings/copies/distance",
        "torch.cat([color, alpha])",
        "torch.cat([color, torch.full_like(alpha, 255)])",
        "duplicates.py::test_what_is_in_the_alpha_channel_alone_is_seen[RGBA-255]",
    ),
    m(
        "average the differences of all tiles",
        "embeddings/copies/distance",
        "(difference / contrast).max()",
        "(difference / contrast).mean()",
        "duplicates.py::test_small_differences_are_seen_and_copies_still_found[drafts]",
    ),
    m(
        "keep copies that are far from the kept image",
        "embeddings/duplicates",
        "copies = {i: match for i, match in matches.items() if match.distance <= self.threshold}",
        "copies = matches",
        "duplicates.py::test_no_image_is_farther_from_the_kept_one_than_the_threshold[0.35-pan]",
    ),
    m(
        "compare images of one color like others",
        "embeddings/duplicates",
        "np.setdiff1d(np.arange(len(x)), list(flat))",
        "np.arange(len(x))",
        "duplicates.py::test_images_of_one_color_are_apart",
    ),
    m(
        "keep the smallest copy",
        "embeddings/duplicates",
        "(-value for value in quality)",
        "(value for value in quality)",
        "duplicates.py::test_the_image_that_is_kept_is_the_best_copy",
    ),
    m(
        "choose the penalty with the largest log loss",
        "embeddings/probe",
        "lambda i: -np.log",
        "lambda i: np.log",
        "embeddings.py::test_a_few_labels_give_labels_for_all_images_and_an_accuracy",
    ),
    m(
        "overwrite the given labels",
        "embeddings/probe",
        "if os.path.realpath(out) == os.path.realpath(labels):",
        "if False:",
        "embeddings.py::test_bad_input_is_one_line_and_leaves_nothing",
    ),
    m(
        "keep any export",
        "exports/format",
        "if not delta <= tolerance",
        "if delta != delta <= tolerance",
        "export.py::test_a_wrong_export_is_not_kept[safetensors]",
    ),
    m(
        "number stages as torchvision does",
        "exports/detectron2",
        "int(stage[1]) + 1",
        "int(stage[1])",
        "export.py::test_detectron2_finds_every_tensor_under_its_own_name_and_reads_rgb[50]",
    ),
    m(
        "stride where Caffe does",
        "exports/detectron2",
        '"STRIDE_IN_1X1": False',
        '"STRIDE_IN_1X1": True',
        "export.py::test_detectron2_finds_every_tensor_under_its_own_name_and_reads_rgb[50]",
    ),
    m(
        "pixels of 0 to 1",
        "exports/detectron2",
        "[round(255 * v, 6) for v in transform.std]",
        "list(transform.std)",
        "export.py::test_detectron2_finds_every_tensor_under_its_own_name_and_reads_rgb[50]",
    ),
    # decoded pixels on disk
    m(
        "trust the disk",
        "sources/disk_cache",
        "height, width, self.channels)) == crc:",
        "height, width, self.channels)) >= 0:",
        "disk_cache.py::test_damage_is_noticed_said_once_and_costs_only_time[0]",
    ),
    m(
        "pixels of any size",
        "sources/disk_cache",
        "if min_side == self.min_side else None",
        "if True else None",
        "disk_cache.py::test_pixels_decoded_for_another_size_are_not_taken",
    ),
    m(
        "forget when files changed",
        "sources/file_index",
        "digest.update(repr(batch",
        "digest.copy().update(repr(batch",
        "disk_cache.py::test_what_changes_is_decoded_anew_and_the_old_file_goes",
    ),
    m(
        "a cache without a bound",
        "sources/disk_cache",
        "if end + pixels.nbytes > limit_bytes:",
        "if end < 0:",
        "disk_cache.py::test_the_file_is_bounded_and_the_rest_is_decoded",
    ),
    # transfer
    m(
        "count VOC's pixels from 0",
        "detection/annotations",
        "[x0 - 1, y0 - 1, x1, y1]",
        "[x0, y0, x1, y1]",
        "annotations.py::test_voc_counts_from_one_and_includes_its_last_pixel",
    ),
    m(
        "keep boxes without an area",
        "detection/annotations",
        "good = (sides > 1).all(1)",
        "good = (sides > -9).all(1)",
        "annotations.py::test_faults_in_voc_are_reported_and_cost_nothing_else",
    ),
    m(
        "learn from crowds",
        "detection/annotations",
        "o.take(~o.crowd)",
        "o",
        "annotations.py::test_coco_is_read_alike",
    ),
    m(
        "difficult objects count",
        "detection/metrics",
        "hard = [o.difficult | o.crowd",
        "hard = [o.crowd",
        "ap.py::test_voc_is_the_reference[0]",
    ),
    m(
        "found twice is right twice",
        "detection/metrics",
        "(wrong if taken[i][level, best] else right)",
        "right",
        "ap.py::test_voc_is_the_reference[0]",
    ),
    m(
        "COCO's 101 points for VOC",
        "detection/metrics",
        "np.arange(0.0, 1.1, 0.1)) / 11",
        "np.linspace(0, 1, 101)) / 101",
        "ap.py::test_voc_is_the_reference[0]",
    ),
    m(
        "anchors in our order",
        "detection/detector",
        "= tensor[rows]",
        "= tensor",
        "detector.py::test_rows_are_in_detectron2s_order",
    ),
    m(
        "the background first",
        "detection/detector",
        "tensor.roll(-1, 0)",
        "tensor",
        "detector.py::test_rows_are_in_detectron2s_order",
    ),
    m(
        "no norm behind conv5",
        "detection/detector",
        "nn.Sequential(conv5, nn.BatchNorm2d(width))",
        "nn.Sequential(conv5, nn.Identity())",
        "detector.py::test_the_full_size_c4_has_detectron2s_names_and_shapes[20-False]",
    ),
    m(
        "take the stride and do not dilate",
        "detection/detector",
        "conv.dilation = conv.padding = (2, 2)",
        "pass",
        "detector.py::test_stride_8_doubles_the_resolution_and_keeps_the_receptive_field",
    ),
    m(
        "flip pixels and not boxes",
        "detection/detector",
        "[size[1] - right, top, size[1] - left, bottom]",
        "[left, top, right, bottom]",
        "detector.py::test_boxes_and_masks_move_with_the_pixels",
    ),
    m(
        "draw from whatever was drawn before",
        "detection/train_detector",
        "        seed_step(self.seed, self.step)\n",
        "        pass\n",
        "transfer.py::test_a_stopped_transfer_continues_bit_for_bit",
    ),
    m(
        "keep moving averages",
        "detection/train_detector",
        "m.momentum = None  #",
        "pass  #",
        "transfer.py::test_averages_are_the_plain_mean_over_batches",
    ),
    m(
        "choose the lr on the test set",
        "detection/transfer",
        "validation_ap(model, self.splits.val",
        "validation_ap(model, self.splits.test",
        "transfer.py::test_the_lr_is_the_best_on_val_and_never_a_diverged_one",
    ),
    m(
        "decay by half",
        "detection/schedules",
        "rise * 0.1**decays",
        "rise * 0.5**decays",
        "transfer.py::test_schedules_are_the_papers",
    ),
    # closed forms
    m(
        "divide view noise by the number of views",
        "model/view_noise",
        "covariance / (images * (views - 1))",
        "covariance / (images * views)",
        "closed_form.py::test_on_drawn_data_the_map_is_the_true_one_up_to_sampling",
    ),
    m(
        "map without subtracting the mean",
        "model/view_noise",
        "-(matrix @ mean.double())",
        "0 * (matrix @ mean.double())",
        "closed_form.py::test_after_the_map_view_noise_is_white",
    ),
    m(
        "multiply by the noise",
        "model/view_noise",
        "torch.linalg.solve_triangular(root, identity, upper=False)",
        "root",
        "closed_form.py::test_after_the_map_view_noise_is_white",
    ),
    m(
        "shrink toward the diagonal",
        "model/view_noise",
        "isotropic * torch.eye(len(mean))",
        "shrinkage * covariance.diagonal().diag()",
        "closed_form.py::test_a_rotation_before_the_map_changes_no_cosine_after_it[0.5]",
    ),
    m(
        "raise responses by the threshold",
        "model/patches",
        "-(m @ kernels) - THRESHOLD",
        "-(m @ kernels) + THRESHOLD",
        "closed_form.py::test_patches_equal_their_definition[24-3]",
    ),
    m(
        "resize without antialiasing",
        "model/patches",
        "distance / max(scale, 1.0)",
        "distance",
        "closed_form.py::test_resizing_is_torchs[48-24]",
    ),
    m(
        "leave images normalized",
        "model/patches",
        "at_least_float32(x) * self.std + self.mean",
        "at_least_float32(x)",
        "closed_form.py::test_two_sizes_are_joined_and_normalization_is_undone",
    ),
    m(
        "find neighbors in the view that judges them",
        "monitoring/signals",
        "neighbors = first.topk(",
        "neighbors = second.topk(",
        "closed_form.py::test_equal_views_agree_and_unrelated_ones_agree_by_chance",
    ),
    m(
        "take a candidate within noise",
        "monitoring/candidates",
        "taken = gain > max(SIGNIFICANT * error, candidate.margin)",
        "taken = gain > max(-SIGNIFICANT * error, candidate.margin)",
        "adapt.py::test_a_candidate_is_taken_only_if_it_is_better_by_more_than_noise",
    ),
    m(
        "ignore the margin",
        "monitoring/candidates",
        "gain > max(SIGNIFICANT * error, candidate.margin)",
        "gain > SIGNIFICANT * error",
        "adapt.py::test_a_candidate_with_a_margin_is_taken_only_beyond_it",
    ),
    m(
        "the error of a sum",
        "monitoring/candidates",
        "difference.std().item() / len(difference) ** 0.5",
        "difference.std().item() / len(difference)",
        "adapt.py::test_the_error_of_a_gain_is_that_of_repeated_draws",
    ),
    m(
        "center with images held out",
        "monitoring/candidates",
        "h[0, :fit].mean(0)",
        "h[0].mean(0)",
        "adapt.py::test_fitting_never_sees_the_images_held_out",
    ),
    m(
        "join features without equal noise",
        "monitoring/candidates",
        "scale = weight / ((matrix @ noise) * matrix).sum().clamp_min(1e-30).sqrt().float()",
        "scale = torch.tensor(weight)",
        "adapt.py::test_side_by_side_a_weight_of_1_gives_both_the_same_view_noise",
    ),
    m(
        "batch norm learns from small batches",
        "training/adaptation/layers",
        "            module.eval()",
        "            module.train()",
        "adapt.py::test_late_layers_train_the_last_half_and_keep_the_statistics_of_batch_norm",
    ),
    m(
        "train the backbone at once",
        "training/adaptation/layers",
        "self._train_late(self.done >= WARMUP_SHARE)",
        "self._train_late(True)",
        "adapt.py::test_the_heads_are_trained_first",
    ),
    m(
        "lose what was tried at Ctrl-C",
        "training/adaptation/adapt",
        "        except Stopped as error:\n            stop = error\n",
        "        except Stopped:\n            raise\n",
        "adapt.py::test_a_signal_during_training_keeps_the_best_of_what_was_tried",
    ),
    # what a run is worth
    m(
        "compare features by the score where there are labels",
        "monitoring/worth",
        "if candidate.hits is not None and other.hits is not None:",
        "if False:",
        "worth.py::test_labels_decide_where_there_are_labels_and_the_score_where_there_are_none",
    ),
    m(
        "take a difference within noise",
        "monitoring/worth",
        "return gain > SIGNIFICANT * error",
        "return gain > 0",
        "worth.py::test_a_difference_within_noise_is_none",
    ),
    m(
        "call a run healthy that learned nothing",
        "monitoring/verdict",
        'if verdict.verdict != "healthy" or not unbeaten:',
        "if True:",
        "worth.py::test_only_a_healthy_run_can_have_learned_little",
    ),
    m(
        "forget the start",
        "training/pretrain",
        'self.state["start"] = measure_start(',
        'self.state["begin"] = measure_start(',
        "worth.py::test_a_run_says_the_same_everywhere_and_resumes_to_the_same",
    ),
    m(
        "warn of one bad batch",
        "monitoring/verdict",
        "median(record[key] for record in records[-3:]) for key",
        "records[-1][key] for key",
        "worth.py::test_a_bad_beginning_is_warned_of_once_and_a_good_one_never",
    ),
    # the encoder and weights by name
    m(
        "compute the map in bfloat16",
        "model/encoder",
        "    with without_autocast(h):\n        return head(at_least_float32(h))",
        "    return head(h)",
        "encoder.py::test_the_map_has_full_precision_where_the_backbone_has_not",
    ),
    m(
        "put the patches first",
        "model/encoder",
        "torch.cat([h, _apply(self.patches_head, self.patches(x))], dim=1)",
        "torch.cat([_apply(self.patches_head, self.patches(x)), h], dim=1)",
        "encoder.py::test_an_encoder_is_the_backbone_then_the_map_and_the_patches_beside_it",
    ),
    m(
        "use a head of other weights",
        "runs/encoder",
        "return digest == tensors_sha256(backbone.state_dict())",
        "return True",
        "encoder.py::test_a_head_of_other_weights_is_refused",
    ),
    m(
        "keep the head of an old backbone",
        "runs/run_folder",
        "(self.path / HEAD_FILE).unlink(missing_ok=True)",
        "pass",
        "encoder.py::test_finishing_a_run_again_deletes_the_head_of_the_old_backbone",
    ),
    m(
        "evaluate without the head only",
        "evaluation/frozen",
        'with_head = (WITH_HEAD,) if settings.features == "h"',
        'with_head = () if settings.features == "h"',
        "encoder.py::test_each_frozen_protocol_adds_a_record_with_the_head",
    ),
    m(
        "fine-tune the head",
        "evaluation/finetune",
        "load(run.path, head=False)",
        "load(run.path)",
        "encoder.py::test_fine_tuning_starts_from_the_backbone_alone",
    ),
    m(
        "fill missing tensors with random numbers",
        "runs/checkpoints/timm_weights",
        "model = timm.create_model(name, pretrained=True)",
        "model = timm.create_model(name, pretrained=True, num_classes=0)",
        "weights.py::test_weights_with_a_missing_tensor_are_not_filled_with_random_numbers",
    ),
    m(
        "ImageNet's mean for every network of timm",
        "runs/checkpoints/timm_weights",
        'tuple(config["mean"])',
        "(0.485, 0.456, 0.406)",
        "weights.py::test_a_repository_of_timm_brings_its_preprocessing",
    ),
    m(
        "let two processes make the same run",
        "runs/weights",
        'file_lock(path.with_name(f".{path.name}.lock"), wait=True)',
        'file_lock(path.with_name(f".{path.name}.lock"))',
        "weights.py::test_two_processes_at_once_make_one_run",
    ),
    m(
        "reuse the run of a file that has changed",
        "runs/weights",
        "return str(path.resolve()), file_sha256(path)",
        'return str(path.resolve()), ""',
        "weights.py::test_a_file_becomes_a_run_with_the_network_that_is_named",
    ),
    m(
        "ignore a new commit of a repository",
        "runs/weights",
        "return name, download_from_hub(name.removeprefix(HUB_PREFIX)).name",
        "return name, name",
        "weights.py::test_a_repository_of_timm_brings_its_preprocessing",
    ),
    m(
        "let a flag contradict the initial weights",
        "runs/compose",
        "if parse_value(given, SETTING_TYPES[name], name) != value:",
        "if False:",
        "weights.py::test_a_flag_that_contradicts_initial_weights_is_named",
    ),
    m(
        "resize by bilinear interpolation always",
        "data/transform",
        "interpolation=mode, antialias=True",
        "antialias=True",
        "weights.py::test_an_image_is_prepared_as_timm_and_torchvision_do[96-110-bicubic]",
    ),
    m(
        "prepare a Pillow image by Pillow's own conversion",
        "data/transform",
        "array = image.numpy(force=True) if isinstance(image, Tensor) else image",
        'array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image',
        "transform.py::test_every_form_of_an_image_is_prepared_as_the_file_is_for_embed[3]",
    ),
    m(
        "turn the caller's Pillow image",
        "data/decode",
        "_image_to_array(image.copy(), channels)",
        "_image_to_array(image, channels)",
        "transform.py::test_an_image_of_the_caller_is_left_as_it_is",
    ),
    m(
        "decode a query at another size than the images",
        "embeddings/neighbors",
        "decode_image(file, recipe.channels, transform.min_side)",
        "decode_image(file, recipe.channels)",
        "transform.py::test_a_query_that_is_a_copy_of_an_image_has_its_feature",
    ),
    m(
        "fine-tune the head alone",
        "detection/initialization",
        "load(self.folder, head=False).requires_grad_(True)",
        "load(self.folder, head=False)",
        "transform.py::test_fine_tuning_and_detection_train_all_of_a_loaded_backbone",
    ),
    m(
        "build a ViT at the size of its design, not of its weights",
        "runs/checkpoints/foreign_checkpoints",
        "image_size = image_size or stored or",
        "image_size = image_size or",
        "own_files.py::test_a_file_is_built_at_the_size_of_its_positions",
    ),
    m(
        "start from position embeddings of another size without resampling",
        "model/backbones",
        "if not wrong or not are_positions or expected.keys() - state.keys():",
        "if True:",
        "own_files.py::test_a_vit_is_started_from_at_its_own_and_at_another_size",
    ),
    m(
        "resample without a word",
        "runs/weights",
        "return [resampling_note(own.image_size, recipe.image_size)]",
        "return []",
        "own_files.py::test_a_vit_is_started_from_at_its_own_and_at_another_size",
    ),
    m(
        "forget the recipe in a checkpoint of this program",
        "runs/checkpoints/own_files",
        "None if content.recipe is None else Recipe.from_dict(content.recipe)",
        "None",
        "own_files.py::test_every_form_brings_its_network_and_its_preprocessing[settings0]",
    ),
    m(
        "take DINO's student",
        "runs/weight_files",
        '"model", "teacher", "student")',
        '"model", "student", "teacher")',
        "convert.py::test_the_state_dict_is_found_in_a_nested_checkpoint",
    ),
    m(
        "refuse objects of other programs",
        "runs/weight_files",
        "            names.append(name)",
        "            raise",
        "convert.py::test_objects_of_other_programs_are_neither_run_nor_in_the_way[True]",
    ),
    m(
        "leave over a token of another network",
        "runs/checkpoints/foreign_checkpoints",
        "if module not in modules and flat:",
        "if module not in modules:",
        "convert.py::test_a_decoder_is_beside_a_vit_and_other_tokens_are_not",
    ),
    m(
        "pass over an incomplete backbone for its slow copy",
        "runs/checkpoints/layouts",
        '"layer1.0.conv1.weight", "layer4.0.conv1.weight"',
        '"layer4.0.conv1.weight"',
        "convert.py::test_an_incomplete_backbone_is_not_passed_over_for_its_slow_copy",
    ),
    m(
        "give MoCo v3's ViT-Small the attention of timm's",
        "runs/checkpoints/layouts",
        'if layout.program == "MoCo v3" and "vit_small" in network:',
        "if False:",
        "convert.py::test_a_vit_of_moco_v3_but_not_its_small_one_which_has_other_attention",
    ),
    m(
        "probe: an empty label is a class",
        "embeddings/probe",
        "if not label:",
        "if False:",
        "embeddings.py::test_probe_reads_the_table_that_it_wrote_with_more_labels",
    ),
    m(
        "timm resizes to one pixel less",
        "exports/timm",
        "while int(transform.size / fraction) < transform.resize:",
        "while False:",
        "weights.py::test_timm_resizes_to_the_same_number_of_pixels",
    ),
    m(
        "leave the head out of torchvision's classifier",
        "exports/torchvision",
        'state |= {f"{path}.{name}": value for name, value in head.state_dict().items()}',
        "state |= {}",
        "export.py::test_an_encoder_is_exported_with_its_head[torchvision-torchvision]",
    ),
]


def test_fails(test: str, mutation: Mutation | None) -> bool:
    """Run a test in a child process that imports a copy of the source.

    Args:
        test: file and name of the test, as pytest takes them, relative to tests/.
        mutation: what to change in the copy; None leaves the copy as it is.

    Returns:
        Whether the test failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", source, ignore=ignore)
        if mutation:
            path = source / "simsiam" / mutation.file
            text = path.read_text()
            count = text.count(mutation.old)
            assert count == 1, f"{mutation.file} has {mutation.old!r} {count} times"
            path.write_text(text.replace(mutation.old, mutation.new))
        if (child := os.fork()) == 0:
            os.environ["PYTHONPATH"] = str(source)  # for processes that the test starts
            sys.path.insert(0, str(source))
            sys.dont_write_bytecode = True
            with (
                open(os.devnull, "w") as null,
                contextlib.redirect_stdout(null),
                contextlib.redirect_stderr(null),
            ):
                import simsiam

                assert Path(simsiam.__file__).is_relative_to(source)
                options = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
                os._exit(int(pytest.main([*options, str(ROOT / "tests" / test)])))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 1), f"{test} ended with exit code {code}"
        return code == 1


if __name__ == "__main__":
    import numpy  # noqa: F401  imported once here, so that the forked children need not
    import pytest
    import scipy.optimize  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    chosen = [x for x in MUTATIONS if all(word in " ".join(x) for word in sys.argv[1:])]
    broken = [test for test in dict.fromkeys(x.test for x in chosen) if test_fails(test, None)]
    survivors = 0
    for x in chosen:
        if x.test in broken:
            outcome = "fails anyway"
        else:
            outcome = "fails" if test_fails(x.test, x) else "SURVIVES"
        survivors += outcome != "fails"
        test = x.test.removeprefix("test_")
        print(f"{outcome:<10}{x.file:<32} {x.description:<42}{test}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations are caught")
    sys.exit(bool(survivors))
