//! Adds what parts of a tile of keys have left of dk and dv, in float32 and in order of the parts, rounds
//! once, and writes it where it belongs.
//!
//! Launched behind the main kernel, for the tiles that it has computed in parts; it may start before that
//! one is over, and so may [`finish`](super::finish) behind it, which has waited for the main kernel's sums
//! when it has waited for this one. Bound by memory, as [`combine`]: lanes of a row have a
//! chunk of 16 bytes each, of all parts; a thread has several rows, whose loads are under way together.

use flex_block_attn_mask::Side;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Reg};

use super::tiles::{self, Tiles};
use super::{Args, KEYS};
use crate::chunk::{self, Heads};
use crate::combine::{self, MOST};
use crate::lists::{self, Call, Lists};

/// What the kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Config {
    /// bfloat16 or float16.
    pub element: Element,
    /// Columns of k and v: 64 or 128.
    pub head_dim: u32,
    /// Parts of a tile: from 2 to [`MOST`].
    pub parts: u32,
}

impl Config {
    /// All there are.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in [Element::Bf16, Element::F16] {
            for head_dim in [64, 128] {
                all.extend((2..=MOST).map(|parts| Self {
                    element,
                    head_dim,
                    parts,
                }));
            }
        }
        all
    }

    /// The launch behind the main kernel's with these arguments, whose tiles are in as many parts.
    pub(super) fn launch(self, args: &Args<'_>) -> Launch {
        let cut = args.in_parts.expect("some tiles in parts").cut;
        assert!(cut.tiles > 0 && cut.parts == self.parts, "{args:?}");
        let call = Call::new(
            args.layout,
            [args.batch, args.heads, args.kv_heads, self.head_dim],
        );
        let mut list = [args.dk, args.dv].map(chunk::args).concat();
        list.push(Arg::U32(call.kv_len));
        list.extend(lists::args(args.plan, args.layout, Side::Columns));
        list.extend(tiles::args(call, cut, args));
        Launch {
            // For dk, then for dv.
            grid: [KEYS / combine::rows_of_block(self.head_dim), cut.tiles, 2],
            args: list,
        }
    }

    /// The kernel.
    pub fn kernel(self) -> Kernel {
        let Self {
            element,
            head_dim,
            parts,
        } = self;
        let name = format!("join_gradients_{element:?}_d{head_dim}_{parts}").to_lowercase();
        Builder::kernel(name, combine::THREADS, |k| self.body(k))
    }

    fn body(self, k: &Builder) {
        let (dk, dv) = (Heads::new(k, "dk"), Heads::new(k, "dv"));
        let kv_len = k.param::<u32>("kv_len");
        let tiles = Tiles::new(k, Lists::new(k), false, self.head_dim);
        let cut = tiles.cut.as_ref().expect("tokens are no video's");

        // What comes behind waits for the end of this one.
        k.grid_launch();
        // Started early, to wait here for the parts.
        k.grid_wait();
        let (tile, which) = (k.cta_y(), k.cta_z());
        let keys = tiles.keys(cut.whole + tile);
        let (rows, chunk) = combine::own_rows(k, self.head_dim);
        let loaded: Vec<_> = rows
            .into_iter()
            .map(|row| {
                let inside = (keys.first + row).lt(kv_len);
                let parts: Vec<[Reg<'_, u32>; 4]> = (0..self.parts)
                    .map(|part| {
                        let part = cut.slots.rows(cut.tiles * part + tile, which);
                        k.load_constants_where(inside, part.chunk(row, chunk))
                    })
                    .collect();
                (row, inside, parts)
            })
            .collect();
        let whole = dk.or(which.equals(1), dv).rows(keys.head, keys.batch);
        for (row, inside, parts) in loaded {
            let mut total = chunk::floats(parts[0], self.element);
            for &words in &parts[1..] {
                for (total, x) in total.iter_mut().zip(chunk::floats(words, self.element)) {
                    *total += x;
                }
            }
            k.if_(inside, || {
                let to = whole.chunk(keys.first + row, chunk);
                k.store_globals(to, chunk::packed(total, self.element));
            });
        }
    }
}
