//! Puts together what parts of tiles of queries have left (`parts`): the launch behind the
//! main one.
//!
//! Parts are rounded to the output's element, and so is what is made of them: an output in parts has the
//! error of a rounding more. Bound by memory, as [`combine`] is, of which it has everything but the
//! places.

use flex_block_attn_ptx::{Builder, Element, Kernel, Launch, Reg};

use super::output::{self, Results};
use super::problem::{Part, Problem};
use super::{Args, Config as Main, Rows};
use crate::combine;
use crate::cut::InParts;

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns: 64 or 128.
    pub head_dim: u32,
    /// Queries of a tile: 128 or 192.
    pub queries: u32,
    /// From 2 to [`combine::MOST`].
    pub parts: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            for (head_dim, queries) in [(64, 128), (64, 192), (128, 128)] {
                all.extend((2..=combine::MOST).map(|parts| Self {
                    element,
                    head_dim,
                    queries,
                    parts,
                }));
            }
        }
        all
    }

    /// A config of the main kernel that reads the same parameters.
    fn main(self) -> Main {
        Main {
            element: self.element,
            head_dim: self.head_dim,
            rows: Rows::Whole(self.queries),
            kv_tile: 128,
            piece: 128,
            mask: None,
            canvas: false,
        }
    }

    /// The launch behind the main one with these arguments, whose tiles are in as many parts.
    pub(super) fn launch(self, args: &Args<'_>, in_parts: InParts) -> Launch {
        let mut list: Vec<_> = output::args(args).collect();
        list.extend(self.main().numbers(args));
        Launch {
            // Thread blocks have so many rows of a tile.
            grid: [
                self.queries / combine::rows_of_block(self.head_dim),
                in_parts.cut.tiles,
                1,
            ],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            queries,
            parts,
        } = self;
        let name =
            format!("join_outputs_{element:?}_d{head_dim}_q{queries}_{parts}").to_lowercase();
        Builder::kernel(name, combine::THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let results = Results::new(k);
        let problem = Problem::new(k, self.main());
        let parts = problem.parts.as_ref().expect("a main kernel of parts");
        let (rows, chunk) = combine::own_rows(k, self.head_dim);

        // Started early, to wait here for the parts.
        k.grid_wait();
        let tile = problem.tile(parts.whole + k.cta_y(), Part::whole(k));
        let (_, first) = problem.row(tile, self.queries);
        let place = results.of_head(&problem, tile.head, tile.batch);
        let rows = rows.into_iter().map(|row| {
            let inside = (first + row).lt(problem.q_len);
            let load = |part| {
                let (rows, lse) = parts.of_part(k.cta_y(), part);
                let [lse] = k.load_constants_where::<f32, 1>(inside, lse + row.times_wide(4));
                let words: [Reg<'_, u32>; 4] =
                    k.load_constants_where(inside, rows.chunk(row, chunk));
                (lse, words)
            };
            (row, inside, (0..self.parts).map(load).collect::<Vec<_>>())
        });
        for (row, inside, parts) in rows.collect::<Vec<_>>() {
            let (words, log_sum) = combine::whole(&parts, self.element);
            let query = first + row;
            k.if_(inside, || {
                k.store_globals(place.rows.chunk(query, chunk), words);
                k.if_(chunk.equals(0) & place.wants_lse, || {
                    k.store_global(place.logarithm(query), log_sum);
                });
            });
        }
    }
}
