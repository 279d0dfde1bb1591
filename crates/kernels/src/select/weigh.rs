//! What makes products importance: of each key a factor, `lambda / |k|`, and what is added,
//! `(lambda - 1) * redundancy`. A thread block has a head: its warps go through all keys twice, first for
//! the sum of the normalised ones, then for the products with it.

use flex_block_attn_ptx::{Builder, Reg};

use super::{inverse_norm, warp_sum};

const WARPS: u32 = 16;
pub(super) const THREADS: u32 = 32 * WARPS;
/// Keys of a warp whose loads are under way together.
const DEPTH: u32 = 8;

/// The kernel for keys of which a lane has `EACH` features.
pub(super) fn body<const EACH: usize>(k: &Builder) {
    let (means, weights) = (k.param::<u64>("k"), k.param::<u64>("weights"));
    let (tiles, lambda) = (k.param::<u32>("tiles"), k.param::<f32>("lambda"));
    let each_bytes = 4 * EACH as u32;
    let row_bytes = 32 * each_bytes;
    k.set_shared_bytes(WARPS * row_bytes);
    let shared = k.shared_base();

    let (warp, lane) = (k.tid() >> 5, k.lane());
    let head = k.cta_y() * k.grid_x() + k.cta_x();
    let first = head.times_wide(tiles);
    let keys = Keys::<EACH> {
        k,
        address: means + first * u64::from(row_bytes) + lane.times_wide(each_bytes),
        row_bytes,
        warp,
        tiles,
    };

    let sums = [0.0f32; EACH].map(|zero| k.var(zero));
    keys.each(|_, features, inverse| {
        for (mut sum, x) in sums.into_iter().zip(features) {
            sum += x * inverse;
        }
    });
    for (i, sum) in (0..).zip(sums) {
        let at = shared + warp * row_bytes + lane * each_bytes;
        k.store_shared(at.at(4 * i), sum);
    }
    k.sync_threads();
    k.if_(k.tid().lt(row_bytes / 4), || {
        let mut total = k.var(0.0f32);
        let column = shared + (k.tid() << 2);
        for warp in 0..WARPS {
            total += k.load_shared::<f32>(column.at(warp * row_bytes));
        }
        k.store_shared(column, total);
    });
    k.sync_threads();

    let total: [Reg<'_, f32>; EACH] =
        std::array::from_fn(|i| k.load_shared(shared + lane * each_bytes + 4 * i as u32));
    let others = (tiles - 1).max(1).to_f32();
    keys.each(|row, features, inverse| {
        let normalised = features.map(|x| x * inverse);
        let with_all = warp_sum(dot(k, normalised, total));
        let with_itself = warp_sum(dot(k, normalised, normalised));
        let redundancy = (with_all - with_itself) / others;
        let weight = [lambda * inverse, (lambda - 1.0) * redundancy];
        k.where_(row.lt(tiles) & lane.equals(0), || {
            k.store_globals(weights + ((first + row.to_u64()) << 3), weight);
        });
    });
}

/// The keys of a head: this lane's features of them.
struct Keys<'k, const EACH: usize> {
    k: &'k Builder,
    /// Those of the first.
    address: Reg<'k, u64>,
    row_bytes: u32,
    warp: Reg<'k, u32>,
    tiles: Reg<'k, u32>,
}

impl<'k, const EACH: usize> Keys<'k, EACH> {
    /// Does something with each key of this warp: its number, its features, 1 over its norm. Some may be
    /// zeros, numbered from the number of tiles on.
    fn each(&self, f: impl Fn(Reg<'k, u32>, [Reg<'k, f32>; EACH], Reg<'k, f32>)) {
        let k = self.k;
        k.for_(self.warp, self.tiles, DEPTH * WARPS, |first| {
            let rows: [_; DEPTH as usize] = std::array::from_fn(|i| first + i as u32 * WARPS);
            let loaded = rows.map(|row| {
                let at = self.address + row.times_wide(self.row_bytes);
                k.load_constants_where::<f32, EACH>(row.lt(self.tiles), at)
            });
            for (row, features) in rows.into_iter().zip(loaded) {
                let squares = warp_sum(dot(k, features, features));
                f(row, features, inverse_norm(k, squares));
            }
        });
    }
}

fn dot<'k, const N: usize>(
    k: &'k Builder,
    a: [Reg<'k, f32>; N],
    b: [Reg<'k, f32>; N],
) -> Reg<'k, f32> {
    a.into_iter()
        .zip(b)
        .fold(k.var(0.0f32), |sum, (a, b)| a.fma(b, sum))
}
