//! [`Mbarrier`]: phases, pending arrivals, bytes under way.
//!
//! In: arrivals and completed bytes, from warps and the bulk engine. Out: whether a phase is over,
//! and what those who waited for it know then.

use flex_block_attn_ptx::ir::Scope;

use crate::clock::{Clock, Component};

/// The largest transaction count, either way.
const MOST_BYTES: i64 = (1 << 20) - 1;

/// An mbarrier.
#[derive(Debug)]
pub(crate) struct Mbarrier {
    pub(crate) address: u32,
    /// Arrivals of a phase.
    pub(crate) count: u32,
    /// Arrivals missing in this phase.
    pub(crate) pending: u32,
    /// Bytes expected minus bytes that came, in this phase.
    pub(crate) bytes: i64,
    /// Phases completed.
    pub(crate) phase: u32,
    /// Phases up to the last one in which a copy was issued, and up to the last one waited for.
    pub(crate) copied: u32,
    pub(crate) acquired: u32,
    /// Its component in clocks: what completes on it is over by phase.
    pub(crate) component: Component,
    /// Who initialised it, when.
    pub(crate) initialised: (Component, u32),
    /// When the initialising warp fenced that for others, if it did.
    pub(crate) fenced: Option<u32>,
    /// What those who arrived in this phase knew.
    gathered: Clock,
    /// What those who arrived in the last phase knew.
    released: Clock,
    /// Likewise, of other thread blocks' threads that released it in the cluster's scope.
    gathered_far: Clock,
    released_far: Clock,
    /// Whether it is none any more.
    pub(crate) invalid: bool,
}

impl Mbarrier {
    /// In phase 0.
    pub(crate) fn new(
        address: u32,
        count: u32,
        component: Component,
        initialised: (Component, u32),
    ) -> Self {
        Self {
            address,
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            copied: 0,
            acquired: 0,
            component,
            initialised,
            fenced: None,
            gathered: Clock::default(),
            released: Clock::default(),
            gathered_far: Clock::default(),
            released_far: Clock::default(),
            invalid: false,
        }
    }

    /// Whether, to somebody's knowledge, a fence has made it known to the async proxy.
    pub(crate) fn is_fenced(&self, clock: &Clock) -> bool {
        let (component, epoch) = self.initialised;
        clock.fenced(component) >= epoch
            || self
                .fenced
                .is_some_and(|fenced| clock.seen(component) >= fenced)
    }

    /// One arrival of somebody who knows `clock`, having announced `bytes`; if it is of another thread
    /// block, in which scope; whether that ends the phase. Of a mistake, the text.
    pub(crate) fn arrive(
        &mut self,
        clock: &Clock,
        bytes: u32,
        far: Option<Scope>,
    ) -> Result<bool, String> {
        match far {
            None => self.gathered.join(clock),
            Some(scope) => {
                self.gathered.join_order(clock);
                if scope != Scope::Cta {
                    self.gathered_far.join_order(clock);
                }
            }
        }
        self.transact(i64::from(bytes))?;
        match self.pending.checked_sub(1) {
            None => {
                return Err(format!(
                    "an arrival beyond its count of {} in phase {}, while {} bytes are missing",
                    self.count, self.phase, self.bytes
                ));
            }
            Some(pending) => self.pending = pending,
        }
        Ok(self.advance())
    }

    /// Bytes came, of a copy issued in phase `issued`; whether that ends the phase.
    pub(crate) fn complete(&mut self, bytes: u32, issued: u32) -> Result<bool, String> {
        if self.phase != issued {
            return Err(format!(
                "a copy of {bytes} bytes issued in phase {issued} completes in phase {}: that \
                 phase expected fewer bytes than were copied",
                self.phase
            ));
        }
        self.transact(-i64::from(bytes))?;
        Ok(self.advance())
    }

    fn transact(&mut self, bytes: i64) -> Result<(), String> {
        self.bytes += bytes;
        if self.bytes.abs() > MOST_BYTES {
            return Err(format!(
                "its transaction count of {} does not fit 21 bits",
                self.bytes
            ));
        }
        Ok(())
    }

    fn advance(&mut self) -> bool {
        if self.pending != 0 || self.bytes != 0 {
            return false;
        }
        self.phase += 1;
        self.pending = self.count;
        std::mem::swap(&mut self.gathered, &mut self.released);
        self.gathered.clear();
        std::mem::swap(&mut self.gathered_far, &mut self.released_far);
        self.gathered_far.clear();
        true
    }

    /// Whether the phase of a parity is over.
    pub(crate) fn is_over(&self, parity: u32) -> bool {
        self.phase & 1 != parity & 1
    }

    /// Tells somebody who waited for the last phase, in a scope, what is over.
    pub(crate) fn acquire(&mut self, clock: &mut Clock, scope: Scope) {
        self.acquired = self.phase;
        clock.join(&self.released);
        if scope != Scope::Cta {
            clock.hear(&self.released_far);
        }
        clock.learn(self.component, self.phase);
    }

    /// Its state, for reports.
    pub(crate) fn describe(&self) -> String {
        let Self {
            phase,
            pending,
            count,
            bytes,
            ..
        } = self;
        let state = match bytes {
            0.. => format!("{pending} of {count} arrivals and {bytes} bytes are missing"),
            _ => format!(
                "{pending} of {count} arrivals are missing, and {} bytes came that were not expected",
                -bytes
            ),
        };
        format!("it is in phase {phase} (parity {}): {state}", phase & 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_end_with_arrivals_and_bytes() {
        let clock = Clock::default();
        let mut barrier = Mbarrier::new(0, 2, 9, (0, 0));
        assert!(barrier.is_over(1) && !barrier.is_over(0));
        assert!(!barrier.complete(16, 0).unwrap());
        assert!(!barrier.arrive(&clock, 16, None).unwrap());
        assert!(barrier.arrive(&clock, 0, None).unwrap());
        assert!(barrier.is_over(0) && !barrier.is_over(1));
        assert!(barrier.complete(16, 0).is_err());
    }

    #[test]
    fn arrivals_beyond_the_count_are_mistakes() {
        let clock = Clock::default();
        let mut barrier = Mbarrier::new(0, 1, 9, (0, 0));
        assert!(!barrier.arrive(&clock, 64, None).unwrap());
        assert!(
            barrier
                .arrive(&clock, 0, None)
                .unwrap_err()
                .contains("beyond its count")
        );
    }
}
