//! Vector clocks: what an agent knows to have happened.
//!
//! In: releases and acquisitions, from barriers and waits. Out: whether an earlier access is known
//! to be over, for the shadows. After Lamport (1978) and FastTrack (Flanagan, Freund 2009), with two
//! additions for Hopper: beside the clock proper there are one of what a proxy fence has made visible
//! to the async proxy, and one of what was released and acquired in the cluster's scope; and
//! asynchronous engines have components of their own.
//!
//! Components of a cluster's clocks, in this order: its threads (ordinary accesses); its warps
//! (their wgmma groups, by number); then, as they come into use, one for each mbarrier (copies that
//! complete on it, by phase) and two for each thread that stores in bulk (groups that have read
//! shared memory, groups that have written global memory).

use std::rc::Rc;

/// A component of clocks.
pub(crate) type Component = u16;

/// What another thread block has published: its number and its warp's clock at that time.
pub(crate) type Published = (u32, Rc<[u32]>);

/// What an agent knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Clock {
    /// By component: accesses up to this epoch are over.
    seen: Vec<u32>,
    /// By component (threads only): ordinary writes up to this epoch are visible to the async proxy.
    fenced: Vec<u32>,
    /// By component (threads only): ordinary writes up to this epoch are visible in all of the cluster.
    told: Vec<u32>,
    /// What other thread blocks published and this agent acquired. Nearly always empty.
    foreign: Vec<Published>,
    /// What of it lies before a proxy fence of global memory.
    foreign_fenced: Vec<Published>,
}

fn raise(values: &mut Vec<u32>, others: &[u32]) {
    if values.len() < others.len() {
        values.resize(others.len(), 0);
    }
    for (value, &other) in values.iter_mut().zip(others) {
        *value = (*value).max(other);
    }
}

/// Adds to what is known of other thread blocks.
fn add(known: &mut Vec<Published>, block: u32, clock: &Rc<[u32]>) {
    match known.iter_mut().find(|(other, _)| *other == block) {
        None => known.push((block, clock.clone())),
        Some((_, old)) if Rc::ptr_eq(old, clock) => {}
        Some((_, old)) => {
            let mut values = old.to_vec();
            raise(&mut values, clock);
            *old = values.into();
        }
    }
}

/// Whether that says that block `block`'s access of `component` in `epoch` is over.
fn holds(known: &[Published], block: u32, component: Component, epoch: u32) -> bool {
    known.iter().any(|(other, clock)| {
        *other == block && clock.get(usize::from(component)).copied().unwrap_or(0) >= epoch
    })
}

impl Clock {
    /// The epoch up to which accesses of `component` are over.
    pub(crate) fn seen(&self, component: Component) -> u32 {
        self.seen.get(usize::from(component)).copied().unwrap_or(0)
    }

    /// The epoch up to which ordinary writes of `component` are visible to the async proxy.
    pub(crate) fn fenced(&self, component: Component) -> u32 {
        self.fenced
            .get(usize::from(component))
            .copied()
            .unwrap_or(0)
    }

    /// The epoch up to which ordinary writes of `component` are visible in all of the cluster.
    pub(crate) fn told(&self, component: Component) -> u32 {
        self.told.get(usize::from(component)).copied().unwrap_or(0)
    }

    /// Learns that accesses of `component` up to `epoch` are over.
    pub(crate) fn learn(&mut self, component: Component, epoch: u32) {
        let component = usize::from(component);
        if self.seen.len() <= component {
            self.seen.resize(component + 1, 0);
        }
        self.seen[component] = self.seen[component].max(epoch);
    }

    /// Learns all that `other`, of the same thread block, knows.
    pub(crate) fn join(&mut self, other: &Self) {
        self.join_order(other);
        raise(&mut self.told, &other.told);
    }

    /// Learns that all that `other` knows was released in the cluster's scope.
    pub(crate) fn hear(&mut self, other: &Self) {
        raise(&mut self.told, &other.seen);
    }

    /// A release in the cluster's scope: all that is known to be over is visible there.
    pub(crate) fn tell(&mut self) {
        let seen = &self.seen;
        raise(&mut self.told, seen);
    }

    /// Learns what is over by what `other` knows, but not what of it is visible in the cluster.
    pub(crate) fn join_order(&mut self, other: &Self) {
        raise(&mut self.seen, &other.seen);
        raise(&mut self.fenced, &other.fenced);
        for (block, clock) in &other.foreign {
            add(&mut self.foreign, *block, clock);
        }
        for (block, clock) in &other.foreign_fenced {
            add(&mut self.foreign_fenced, *block, clock);
        }
    }

    /// Learns what thread block `block` published.
    pub(crate) fn acquire(&mut self, block: u32, clock: &Rc<[u32]>) {
        add(&mut self.foreign, block, clock);
    }

    /// Whether block `block`'s access of `component` in `epoch` is known to be over.
    pub(crate) fn knows_foreign(&self, block: u32, component: Component, epoch: u32) -> bool {
        holds(&self.foreign, block, component, epoch)
    }

    /// Whether it is visible to the async proxy, too.
    pub(crate) fn has_fenced_foreign(&self, block: u32, component: Component, epoch: u32) -> bool {
        holds(&self.foreign_fenced, block, component, epoch)
    }

    /// What a release at device scope publishes: own knowledge, and what was acquired before.
    pub(crate) fn publish(&self, block: u32) -> Vec<Published> {
        let mut published = self.foreign.clone();
        published.retain(|(known, _)| *known != block);
        published.push((block, self.seen.as_slice().into()));
        published
    }

    /// A proxy fence: all that is known to be over is visible to the async proxy.
    pub(crate) fn fence(&mut self) {
        let seen = &self.seen;
        raise(&mut self.fenced, seen);
    }

    /// A proxy fence of global memory: so is what other thread blocks did there.
    pub(crate) fn fence_foreign(&mut self) {
        self.foreign_fenced.clone_from(&self.foreign);
    }

    /// Forgets everything; keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.seen.clear();
        self.fenced.clear();
        self.told.clear();
        self.foreign.clear();
        self.foreign_fenced.clear();
    }
}
