//! A vector with holes whose keys are never used twice.

/// Where an entry is, and which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    serial: u64,
    slot: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Arena<T> {
    slots: Vec<Option<(u64, T)>>,
    next_serial: u64,
}

impl<T> Arena<T> {
    pub(super) const fn new() -> Self {
        Self {
            slots: Vec::new(),
            next_serial: 0,
        }
    }

    pub(super) fn insert(&mut self, value: T) -> Key {
        let key = self.unused_key();
        let entry = Some((key.serial, value));
        match self.slots.get_mut(key.slot) {
            Some(free) => *free = entry,
            None => self.slots.push(entry),
        }
        key
    }

    /// The key of the next entry; a caller that does not insert one has a key of nothing.
    pub(super) fn unused_key(&mut self) -> Key {
        let serial = self.next_serial;
        self.next_serial += 1;
        let free = self.slots.iter().position(Option::is_none);
        Key {
            serial,
            slot: free.unwrap_or(self.slots.len()),
        }
    }

    pub(super) fn get(&self, key: Key) -> Option<&T> {
        match self.slots.get(key.slot)? {
            Some((serial, value)) if *serial == key.serial => Some(value),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        match self.slots.get_mut(key.slot)? {
            Some((serial, value)) if *serial == key.serial => Some(value),
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        self.slots.get_mut(key.slot)?.take().map(|(_, value)| value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(slot, entry)| {
            let (serial, value) = entry.as_ref()?;
            let serial = *serial;
            Some((Key { serial, slot }, value))
        })
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(|(slot, entry)| {
                let (serial, value) = entry.as_mut()?;
                let serial = *serial;
                Some((Key { serial, slot }, value))
            })
    }

    pub(super) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for entry in &mut self.slots {
            if entry.as_ref().is_some_and(|(_, value)| !keep(value)) {
                *entry = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_used_again_but_a_key_is_not() {
        let mut arena = Arena::new();
        let first = arena.insert('a');
        assert_eq!(arena.remove(first), Some('a'));
        let second = arena.insert('b');
        assert_eq!(second.slot, first.slot);
        assert_eq!(arena.get(first), None);
        assert_eq!(arena.remove(first), None);
        assert_eq!(arena.get(second), Some(&'b'));
        let none = arena.unused_key();
        assert_eq!(arena.get(none), None);
        arena.insert('c');
        assert_eq!(arena.get(none), None);
    }
}
