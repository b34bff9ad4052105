-- include: common
-- A collection of a host's store ended: counters and one event, when it changed anything.
--
-- ARGV  1 host   2 blobs moved to the trash   3 their bytes   4 blobs deleted from the trash   5 their bytes
--       6 layouts that left the store
-- Returns 1 when there was something to note, else 0
local host, moved, moved_bytes, deleted, freed, layouts = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6)
count('collections')
if tonumber(moved) + tonumber(deleted) + tonumber(layouts) == 0 then
  return 0
end
count('collect_moved_blobs', moved)
count('collect_moved_bytes', moved_bytes)
count('collect_freed_blobs', deleted)
count('collect_freed_bytes', freed)
event('store.collected', 'host', host, 'moved_blobs', moved, 'moved_bytes', moved_bytes, 'freed_blobs', deleted,
  'freed_bytes', freed, 'layouts', layouts)
return 1
