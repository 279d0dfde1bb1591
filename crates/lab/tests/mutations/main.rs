//! Mutations: the real kernels, each with one thing wrong, which the verifier, the emulator or the
//! comparison with float64 must find. This is the proof that they would find it in a new kernel.
//!
//! A mutation is an entry of a table: what is edited, in which problem, and who must find it. An
//! edit that finds nothing to change fails the suite, so entries cannot go stale unnoticed.
//!
//! - `edit`: ways to change a kernel; `trace`: what operands are computed from;
//! - `fences`, `phases`, `counters`, `handover`, `notes`, `lists`, `groups`, `warps`, `places`, `values`,
//!   `results`: the table, by what is broken; `gradients`: the same of the backward pass; `choices`: of what
//!   tiles are chosen by; `videos`: a video's attention; `parts`, `parts_of_keys`: tiles in parts;
//!   `mixed`: tiles of queries of several blocks; `pairs`: pairs of thread blocks;
//! - `needed`: that no instruction that orders others can be left out;
//! - `texts`: that reports say all that a user needs.

mod choices;
mod counters;
mod edit;
mod fences;
mod gradients;
mod groups;
mod handover;
mod lists;
mod mixed;
mod needed;
mod notes;
mod pairs;
mod parts;
mod parts_of_keys;
mod phases;
mod places;
mod results;
mod texts;
mod trace;
mod values;
mod videos;
mod warps;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use flex_block_attn::{BlockMask, Extents};
use flex_block_attn_emulator::Options;
use flex_block_attn_kernels::{Element, backward, forward};
use flex_block_attn_lab::problems::{Backward, Failure, Forward, Product, Setup};
use flex_block_attn_ptx::verify;

/// Problems: small, but every ring goes round and, in the first two, all that orders others is
/// executed and matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Base {
    /// The matrix product, seven steps through three stages, two thread blocks.
    Gemm,
    /// Attention forward, head dimension 128, tiles and blocks of 128 keys, one thread block: rows
    /// of four tiles, of none, of five, of two and twice of one, of which the longest comes first. Both
    /// stages are last in some row, are waited for by the same row's tiles, and are used again by a
    /// later one.
    Wide,
    /// Head dimension 64, tiles of 192 keys, two tiles to a block of keys, two heads with masks of
    /// their own and common keys.
    Short,
    /// Head dimension 64, tiles of 192 keys out of pieces of 64, three to a block of keys, the last
    /// block short; blocks of 256 queries, the last so short that of its tiles there is but one, and
    /// not all of that; two batches with masks of their own, of which the first's last tile of queries
    /// has no keys; two thread blocks.
    Ragged,
    /// The same, three tiles as a whole and five in two parts each.
    Parts,
    /// Attention backward, head dimension 128, four thread blocks, with five tiles of queries, four, one
    /// and none: last ones in either stage, and some behind them. Of the last keys not all are there.
    Gradients,
    /// The same, deterministic: sums of integers.
    Integers,
    /// Attention backward, with tiles of keys in parts.
    PartsOfKeys,
    /// The same: the kernel that puts these together.
    Joined,
    /// Attention forward over tiles of queries of several blocks.
    Mixed,
    /// Attention forward, a pair of thread blocks that share keys.
    Pairs,
    /// Attention forward over a video.
    Video,
    /// Means of tiles.
    Means,
    /// A choice of tiles by their means: the kernel that weighs keys.
    Weights,
    /// The same: the kernel that scores, and keeps the best.
    Masks,
}

/// With this scale scores lie so far apart that weights are computed anew, and sums rescaled.
const FAR: f64 = 8.0;

const BASES: [Base; 15] = [
    Base::Gemm,
    Base::Wide,
    Base::Short,
    Base::Ragged,
    Base::Parts,
    Base::Gradients,
    Base::Integers,
    Base::PartsOfKeys,
    Base::Joined,
    Base::Mixed,
    Base::Pairs,
    Base::Video,
    Base::Means,
    Base::Weights,
    Base::Masks,
];

impl Base {
    fn setup(self) -> Setup {
        let config = |head_dim, kv_tile, piece| forward::Config {
            element: Element::Bf16,
            head_dim,
            rows: forward::Rows::Whole(128),
            kv_tile,
            piece,
            mask: None,
            canvas: false,
        };
        match self {
            Self::Gemm => Product {
                element: Element::Bf16,
                m: 256,
                n: 256,
                k: 448,
            }
            .setup(),
            Self::Wide => {
                let mask = mask(
                    [768, 640, 128, 128],
                    [1, 1],
                    &[&[0, 1, 2, 4], &[], &[0, 1, 2, 3, 4], &[1, 2], &[3], &[0]],
                );
                Forward {
                    blocks: 1,
                    scale: FAR,
                    ..Forward::new(config(128, 128, 128), mask)
                }
                .setup()
            }
            Self::Short => {
                let mask = mask([128, 768, 128, 384], [1, 2], &[&[0, 1], &[1]]);
                Forward {
                    heads: 2,
                    blocks: 1,
                    scale: FAR,
                    ..Forward::new(config(64, 192, 192), mask)
                }
                .setup()
            }
            Self::Ragged | Self::Parts => {
                let mask = mask(
                    [300, 456, 256, 192],
                    [2, 1],
                    &[&[0, 2], &[], &[0, 1, 2], &[2]],
                );
                Forward {
                    batch: 2,
                    in_parts: (self == Self::Parts).then_some((3, 2)),
                    ..Forward::new(config(64, 192, 64), mask)
                }
                .setup()
            }
            Self::Gradients => gradients(false),
            Self::Integers => gradients(true),
            Self::PartsOfKeys => parts_of_keys::problem().setup(),
            Self::Joined => parts_of_keys::problem().joined(),
            Self::Mixed => mixed::forward(),
            Self::Pairs => pairs::forward(),
            Self::Video => videos::forward(),
            Self::Means => choices::means(),
            Self::Weights => choices::weights(),
            Self::Masks => choices::masks(),
        }
    }
}

/// Five blocks of queries see the last 114 keys, four the first 128, one those behind, none the next.
fn gradients(deterministic: bool) -> Setup {
    let mask = mask(
        [320, 498, 64, 128],
        [1, 1],
        &[&[0, 3], &[0, 1, 3], &[3], &[0, 3], &[0, 3]],
    );
    let config = backward::Config::choose(Element::Bf16, 128, 64, 128, None, deterministic);
    Backward::new(config.expect("blocks are multiples of 16"), mask).setup()
}

/// The mask of some batches and heads that keeps these blocks of keys in each row of blocks.
fn mask(
    [q_len, kv_len, q_block, kv_block]: [usize; 4],
    [batch, heads]: [usize; 2],
    rows: &[&[usize]],
) -> BlockMask {
    let extents = Extents::new(q_len, kv_len, q_block, kv_block).unwrap();
    let lists: Vec<Vec<usize>> = rows.iter().map(|row| row.to_vec()).collect();
    BlockMask::from_row_lists(extents, batch, heads, &lists).unwrap()
}

/// Who must find a mutation.
#[derive(Debug, Clone, Copy)]
enum By {
    /// The verifier, by one of these faults.
    Verifier(&'static [&'static str]),
    /// The emulator, by one of these kinds.
    Emulator(&'static [&'static str]),
    /// The comparison with float64, without any fault.
    Result,
}

/// One planted fault.
struct Mutation {
    name: &'static str,
    /// What sort of mistake it is.
    kind: &'static str,
    base: Base,
    /// Makes it; returns how many places were changed.
    edit: fn(&mut Setup) -> usize,
    by: By,
}

impl std::fmt::Display for Mutation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} | {} | {:?}", self.name, self.kind, self.base)
    }
}

fn table() -> Vec<Mutation> {
    [
        fences::table(),
        groups::table(),
        phases::table(),
        counters::table(),
        handover::table(),
        notes::table(),
        parts::table(),
        lists::table(),
        warps::table(),
        places::table(),
        values::table(),
        results::table(),
        gradients::table(),
        parts_of_keys::table(),
        mixed::table(),
        pairs::table(),
        choices::table(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The ways in which kernels are run here, with so many seeds. The limit is a hundred times what right
/// kernels need.
fn ways(seeds: u64) -> Vec<Options> {
    let limit = 1 << 24;
    let limited = |options| Options { limit, ..options };
    Options::all(seeds).into_iter().map(limited).collect()
}

/// The name of an enum's variant.
fn variant(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find(|c: char| !c.is_alphanumeric());
    text[..end.unwrap_or(text.len())].to_owned()
}

/// Who found a mistake in a launch, and what is said of it; none if nobody did.
fn found(setup: &Setup, ways: &[Options]) -> Option<(String, String)> {
    if let Err(error) = verify(setup.kernel()) {
        let who = format!("verifier: {}", variant(&error.fault));
        return Some((who, error.to_string()));
    }
    ways.iter().find_map(|options| match setup.run(options) {
        Ok(_) => None,
        Err(Failure::Fault(fault)) => {
            let who = format!("emulator: {}", variant(&fault.kind));
            Some((who, fault.to_string()))
        }
        Err(Failure::Wrong(text)) => Some(("result".to_owned(), text)),
        Err(Failure::Gpu(_)) => unreachable!("the emulator is no GPU"),
    })
}

impl Mutation {
    /// The launch with the mistake in it, and what was found; or why that is not as it should be.
    fn check(&self, bases: &BTreeMap<Base, Setup>) -> Result<(String, String), String> {
        let mut setup = bases[&self.base].clone();
        if (self.edit)(&mut setup) == 0 {
            return Err("the edit changes nothing".to_owned());
        }
        let Some((who, text)) = found(&setup, &ways(2)) else {
            return Err("not found".to_owned());
        };
        let (finder, kinds) = match self.by {
            By::Verifier(kinds) => ("verifier: ", kinds),
            By::Emulator(kinds) => ("emulator: ", kinds),
            By::Result => ("result", &[""][..]),
        };
        if kinds.iter().any(|kind| who == format!("{finder}{kind}")) {
            Ok((who, text))
        } else {
            Err(format!("found as {who}, not as {:?}: {text}", self.by))
        }
    }
}

/// Does `f` for each of `items`, on all cores.
fn each<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { break };
                    let result = f(item);
                    results.lock().expect("no panic").push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner().expect("no panic");
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn unchanged_kernels_are_right() {
    for (base, found) in BASES
        .iter()
        .zip(each(&BASES, |base| found(&base.setup(), &ways(2))))
    {
        assert!(found.is_none(), "{base:?}: {found:?}");
    }
}

#[test]
fn every_mutation_is_found() {
    let bases = BASES.map(|base| (base, base.setup())).into();
    let table = table();
    let names: BTreeSet<&str> = table.iter().map(|mutation| mutation.name).collect();
    assert_eq!(names.len(), table.len(), "names are given twice");
    let kinds: BTreeSet<&str> = table.iter().map(|mutation| mutation.kind).collect();
    assert!(table.len() >= 300, "{} mutations", table.len());
    assert!(kinds.len() >= 45, "{} kinds: {kinds:?}", kinds.len());

    let mut survivors = String::new();
    for (mutation, result) in table.iter().zip(each(&table, |m| m.check(&bases))) {
        if let Err(why) = result {
            survivors += &format!("\n{mutation} | {why}");
        }
    }
    assert!(survivors.is_empty(), "survivors:{survivors}");
}

#[test]
#[ignore = "prints the table, with what is said of each mutation: for --nocapture"]
fn what_is_said() {
    let bases = BASES.map(|base| (base, base.setup())).into();
    for mutation in table() {
        if let Ok((who, text)) = mutation.check(&bases) {
            println!("{mutation} | {who}\n{text}\n");
        }
    }
}
