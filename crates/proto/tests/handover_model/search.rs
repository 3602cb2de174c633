//! Breadth-first search over every reachable world, and backward reachability over the graph that it leaves.
//!
//! A search of its own rather than a library's: the questions that matter here are "from *every* reachable state *some* fair path
//! leads to a good end" and the same over a part of the edges, which needs the whole graph kept and walked backwards.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{Hash, Hasher};

use crate::model::Model;
use crate::world::{Event, World};

/// States of one search; a larger one is a mistake in its setup.
const MAX_STATES: usize = 4_000_000;

/// What a search found in a world without a flaw.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    pub(crate) settled: usize,
    pub(crate) source_owns: usize,
    /// The phases of both machines that were seen, by name.
    pub(crate) phases: BTreeSet<&'static str>,
}

/// A broken rule, and the shortest way to it.
#[derive(Debug)]
pub(crate) struct Flaw {
    pub(crate) rule: String,
    pub(crate) way: Vec<String>,
}

struct Graph {
    ids: HashMap<u128, u32>,
    /// How each state was reached first.
    parents: Vec<(u32, Option<Event>)>,
    settled: Vec<u32>,
    /// States in which the source's guest runs.
    runs: Vec<u32>,
    /// States in which it must be able to.
    owns: Vec<u32>,
    fair: Vec<(u32, u32)>,
    alone: Vec<(u32, u32)>,
}

pub(crate) fn search(model: &Model) -> Result<Found, Flaw> {
    let at_once = |rule| Flaw { rule, way: Vec::new() };
    let first = model.start().map_err(at_once)?;
    let mut graph = Graph {
        ids: HashMap::from([(fingerprint(&first), 0)]),
        parents: vec![(0, None)],
        settled: Vec::new(),
        runs: Vec::new(),
        owns: Vec::new(),
        fair: Vec::new(),
        alone: Vec::new(),
    };
    let mut steps = 0;
    let mut phases = BTreeSet::new();
    let mut queue = VecDeque::from([(0u32, first)]);
    while let Some((id, world)) = queue.pop_front() {
        phases.extend(world.source.as_ref().map(|s| s.phase().name()));
        phases.extend(world.destination.as_ref().map(|d| d.phase().name()));
        if model.settled(&world) {
            graph.settled.push(id);
        }
        if world.source_runs() {
            graph.runs.push(id);
        }
        if model.source_owns(&world) {
            graph.owns.push(id);
        }
        for event in model.events(&world) {
            let next = match model.step(&world, event) {
                Ok(Some(next)) => next,
                Ok(None) => continue,
                Err(rule) => {
                    let mut way = graph.way(id);
                    way.push(event);
                    return Err(graph.flaw(model, rule, way));
                }
            };
            steps += 1;
            let (to, new) = graph.visit(fingerprint(&next), id, event);
            if event.fair() {
                graph.fair.push((id, to));
            }
            if event.source_alone() {
                graph.alone.push((id, to));
            }
            if new {
                queue.push_back((to, next));
            }
        }
        if graph.parents.len() > MAX_STATES {
            return Err(at_once(format!("more than {MAX_STATES} states: narrow the setup")));
        }
    }
    let states = graph.parents.len();
    let ends = reaching(states, &graph.fair, &graph.settled);
    if let Some(stuck) = (0..states as u32).find(|id| !ends[*id as usize]) {
        let rule = "stuck: no fair path leads to an end".into();
        return Err(graph.flaw(model, rule, graph.way(stuck)));
    }
    let resumes = reaching(states, &graph.alone, &graph.runs);
    if let Some(stuck) = graph.owns.iter().find(|id| model.setup.guest_ran && !resumes[**id as usize]) {
        let rule = "I2: the source cannot resume its guest alone".into();
        return Err(graph.flaw(model, rule, graph.way(*stuck)));
    }
    Ok(Found { states, steps, settled: graph.settled.len(), source_owns: graph.owns.len(), phases })
}

impl Graph {
    fn visit(&mut self, print: u128, from: u32, event: Event) -> (u32, bool) {
        let fresh = self.parents.len() as u32;
        let id = *self.ids.entry(print).or_insert(fresh);
        if id == fresh {
            self.parents.push((from, Some(event)));
        }
        (id, id == fresh)
    }

    fn way(&self, mut id: u32) -> Vec<Event> {
        let mut way = Vec::new();
        while let (parent, Some(event)) = self.parents[id as usize] {
            way.push(event);
            id = parent;
        }
        way.reverse();
        way
    }

    /// Walks the way again to tell it with phases.
    fn flaw(&self, model: &Model, rule: String, events: Vec<Event>) -> Flaw {
        let mut world = model.start().ok();
        let way = events.into_iter().map(|event| {
            world = world.as_ref().and_then(|w| model.step(w, event).ok().flatten());
            match &world {
                Some(w) => format!("{event:?} -> {}", told(w)),
                None => format!("{event:?} -> broken"),
            }
        });
        Flaw { rule, way: way.collect() }
    }
}

fn told(world: &World) -> String {
    let source = world.source.as_ref().map_or("down", |s| s.phase().name());
    let destination = world.destination.as_ref().map_or("down", |d| d.phase().name());
    let [here, there] = world.nodes.each_ref().map(|n| (n.vmm, n.outcome));
    format!("{source} {here:?} | {destination} {there:?}")
}

/// From which states `edges` lead to one of `targets`.
fn reaching(states: usize, edges: &[(u32, u32)], targets: &[u32]) -> Vec<bool> {
    // Edges by their end, as one flat array with an index.
    let mut starts = vec![0u32; states + 2];
    for (_, to) in edges {
        starts[*to as usize + 2] += 1;
    }
    for i in 2..starts.len() {
        starts[i] += starts[i - 1];
    }
    let mut from = vec![0u32; edges.len()];
    for (begin, to) in edges {
        let slot = &mut starts[*to as usize + 1];
        from[*slot as usize] = *begin;
        *slot += 1;
    }
    let mut reached = vec![false; states];
    let mut stack = targets.to_vec();
    targets.iter().for_each(|t| reached[*t as usize] = true);
    while let Some(id) = stack.pop() {
        for begin in &from[starts[id as usize] as usize..starts[id as usize + 1] as usize] {
            if !std::mem::replace(&mut reached[*begin as usize], true) {
                stack.push(*begin);
            }
        }
    }
    reached
}

/// Two lanes of 64 bits, each word folded in by a wide multiplication; the standard hasher, run twice, takes half of the
/// search's time. With some 2^22 states among 2^128 values no two are mistaken for each other.
struct Print([u64; 2]);

impl Hasher for Print {
    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.write_u64(u64::from_le_bytes(padded) ^ (word.len() as u64) << 56);
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }

    fn write_u64(&mut self, word: u64) {
        const KEYS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93];
        for (lane, key) in self.0.iter_mut().zip(KEYS) {
            let wide = u128::from(*lane ^ word ^ key) * u128::from(key.rotate_left(17) | 1);
            *lane = (wide as u64 ^ (wide >> 64) as u64).rotate_left(23).wrapping_add(word);
        }
    }

    fn finish(&self) -> u64 {
        self.0[0]
    }
}

fn fingerprint(world: &World) -> u128 {
    let mut print = Print([1, 2]);
    world.hash(&mut print);
    u128::from(print.0[0]) << 64 | u128::from(print.0[1])
}
